"""Faults: when each begins, and that those of processes happen, are taken back, and prove it."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from gangline.orchestrator import faults_hook
from gangline.orchestrator.faults import FAULT_KINDS, Fault, Progress, begins_in_s, labels_of
from gangline.orchestrator.faults_inject import _ACTS, injected
from gangline.orchestrator.faults_stage import FaultError, Stage, WorkerPlace, state_of

NOW = 1000.0
# Writes down the time every 10 ms, and listens as a worker in a lab does.
PROGRAM = """
import os, sys, time
from pathlib import Path
from gangline.orchestrator import faults_hook
faults_hook.FOLDER = Path(sys.argv[1])
faults_hook.listen_in_a_lab()
beat = os.open(Path(sys.argv[1], "beat"), os.O_CREAT | os.O_WRONLY)
while True:
    os.pwrite(beat, f"{time.monotonic():020.6f}".encode(), 0)
    time.sleep(0.01)
"""


def fault_of(kind: str, **fields: Any) -> Any:
    return TypeAdapter(Fault).validate_python({"kind": kind, **fields})


@pytest.mark.parametrize(
    ("moment", "progress", "wait_s"),
    [
        ({"at_step": 5}, Progress(NOW), math.inf),
        ({"at_step": 5}, Progress(NOW, NOW, 4), math.inf),
        ({"at_step": 5}, Progress(NOW, NOW, 5), 0.0),
        ({"at_step": 5}, Progress(NOW, NOW, 9), 0.0),
        ({"at_step": 5}, Progress(NOW, NOW, 9, is_staffed=False), math.inf),
        ({"at_s": 3}, Progress(NOW - 60), math.inf),
        ({"at_s": 3}, Progress(NOW - 60, NOW - 1, 1), 2.0),
        ({"at_s": 3}, Progress(NOW - 60, NOW - 4, 50), 0.0),
        ({"at_s": 0}, Progress(NOW - 60, NOW, 1), 0.0),
        ({"from_start_s": 3}, Progress(NOW - 1), 2.0),
        ({"from_start_s": 3}, Progress(NOW - 4), 0.0),
    ],
)
def test_a_fault_begins_at_its_moment(moment: dict, progress: Progress, wait_s: float) -> None:
    fault = fault_of("kill_worker", rank=0, **moment)
    assert begins_in_s(fault, progress, NOW) == pytest.approx(wait_s)


def test_every_kind_has_a_model_and_an_act() -> None:
    assert set(FAULT_KINDS) == set(_ACTS)
    for kind, model in FAULT_KINDS.items():
        assert model.model_fields["kind"].annotation.__args__ == (kind,)  # type: ignore[union-attr]


def test_labels_are_the_names_or_kinds_and_tell_equal_ones_apart() -> None:
    kills = [fault_of("kill_worker", rank=rank, at_step=1) for rank in range(3)]
    named = fault_of("kill_worker", rank=0, at_step=1, name="kill_worker-2")
    assert labels_of([*kills, named]) == [
        "kill_worker",
        "kill_worker-2",
        "kill_worker-3",
        "kill_worker-2-2",
    ]


class OneWorker(Stage):
    """A stage whose rank 0 is a process of this machine; it has no lab."""

    def __init__(self, pid: int, folder: Path) -> None:
        super().__init__(lab=SimpleNamespace(), note=lambda line: None)  # type: ignore[arg-type]
        host: Any = SimpleNamespace(name="host0", path=lambda inside: folder / Path(inside).name)
        self.pid, self.place = pid, WorkerPlace(0, "w0", host, pid, pid)

    def worker(self, rank: int | str) -> WorkerPlace:
        if rank != 0:
            raise FaultError(f"there is no such rank ({rank}): 1 ranks run")
        return self.place


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[OneWorker]:
    tmp_path.chmod(0o700)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)])
    beat = tmp_path / "beat"
    deadline_s = time.monotonic() + 30
    while not beat.exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    yield OneWorker(process.pid, tmp_path)
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()


def play(fault: Any, stage: Stage, *, for_s: float = 1.0, leave_out: bool = False) -> Any:
    progress = Progress(time.time(), time.time(), 1)
    with injected([fault], stage, lambda: progress, leave_out=leave_out) as records:
        time.sleep(for_s)
    return records[0]


def last_beat(folder: Path) -> float:
    return float((folder / "beat").read_text() or 0)


def beats_again(folder: Path) -> bool:
    now_s = time.monotonic()
    while last_beat(folder) < now_s:
        if time.monotonic() > now_s + 10:
            return False
        time.sleep(0.01)
    return True


def test_a_killed_worker_is_gone(stage: OneWorker) -> None:
    record = play(fault_of("kill_worker", rank=0, at_step=1), stage, for_s=0.3)
    assert record.doubt == ""
    assert (record.rank, record.host, record.target) == (0, "host0", "rank 0 on host0")
    assert state_of(stage.pid) in ("Z", "")


def test_a_stopped_worker_goes_on_afterwards(stage: OneWorker, tmp_path: Path) -> None:
    record = play(fault_of("stop_worker", rank=0, at_step=1, for_s=0.5), stage, for_s=0.9)
    assert record.doubt == ""
    assert record.ended_at - record.begun_at == pytest.approx(0.5, abs=0.3)
    assert beats_again(tmp_path)


def test_a_fault_without_an_end_is_taken_back_when_the_run_ends(stage: OneWorker) -> None:
    record = play(fault_of("stop_worker", rank=0, at_step=1), stage, for_s=0.3)
    assert record.doubt == ""
    assert record.ended_at is None
    assert state_of(stage.pid) != "T"


def test_a_slowed_worker_runs_a_part_of_the_time(stage: OneWorker) -> None:
    fault = fault_of("slow_compute", rank=0, at_step=1, slowdown=4, for_s=0.8)
    record = play(fault, stage, for_s=1.2)
    assert record.doubt == "", record.proofs
    assert state_of(stage.pid) != "T"


def test_a_worker_that_holds_its_gil_is_alive_and_runs_no_python(
    stage: OneWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults_hook, "FOLDER", tmp_path)
    progress = Progress(time.time(), time.time(), 1)
    fault = fault_of("hold_gil", rank=0, at_step=1, for_s=2)
    with injected([fault], stage, lambda: progress) as (record,):
        answer = faults_hook.answer_path(stage.pid)
        while not answer.exists():
            time.sleep(0.005)
        held = last_beat(tmp_path)
        time.sleep(0.5)
        assert last_beat(tmp_path) == held, "not a line of Python ran"
        assert state_of(stage.pid) == "S"
        assert beats_again(tmp_path)
    assert record.doubt == "", record.proofs
    assert beats_again(tmp_path)


def test_the_hook_listens_only_in_a_folder_of_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listens(folder: Path) -> bool:
        begun: list[object] = []
        thread = SimpleNamespace(start=lambda: begun.append(1))
        monkeypatch.setattr(faults_hook, "FOLDER", folder)
        monkeypatch.setattr(threading, "Thread", lambda **_: thread)
        faults_hook.listen_in_a_lab()
        return bool(begun)

    assert not listens(tmp_path / "nowhere"), "no lab, no hook"
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    assert listens(private)
    (tmp_path / "link").symlink_to(private)
    assert not listens(tmp_path / "link")
    private.chmod(0o777)
    assert not listens(private)


def test_a_fault_that_cannot_happen_says_why(stage: OneWorker) -> None:
    record = play(fault_of("kill_worker", rank=3, at_step=1), stage, for_s=0.1)
    assert record.doubt == "there is no such rank (3): 1 ranks run"
    assert os.path.exists(f"/proc/{stage.pid}")


def test_a_fault_whose_moment_never_comes_has_not_happened(stage: OneWorker) -> None:
    record = play(fault_of("kill_worker", rank=0, at_step=99), stage, for_s=0.1)
    assert record.doubt == "its moment never came"


def test_a_fault_that_is_left_out_does_nothing_and_keeps_its_time(stage: OneWorker) -> None:
    fault = fault_of("stop_worker", rank=0, at_step=1, for_s=0.2)
    record = play(fault, stage, for_s=0.5, leave_out=True)
    assert record.doubt == "it was left out"
    assert record.ended_at - record.begun_at == pytest.approx(0.2, abs=0.2)
    assert (record.target, record.rank) == ("rank 0 on host0", 0), "whom it would have hit"
    assert state_of(stage.pid) != "T"
