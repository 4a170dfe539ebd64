"""The controller under real faults, on a real private Ray, with a program that has no torch.

Each test proves that its fault happened (a pid that is gone, an event that names it) and that
there was progress before it.
"""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from .toy_run import ToyRun

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def worker_of(record: dict, rank: int | None) -> dict | None:
    if record["type"] != "progress" or record["state"] != "RUNNING" or record["step"] < 10:
        return None
    found = [w for w in record["workers"] if w["rank"] == rank and w["pid"]]
    return found[0] if found else None


def kill_once(rank: int | None, number: int = signal.SIGKILL):
    def act(record: dict, run: ToyRun) -> None:
        worker = worker_of(record, rank)
        if worker and not run.harmed:
            run.harmed.append(worker)
            os.kill(worker["pid"], number)

    return act


def is_gone(pid: int, timeout_s: float = 10.0) -> bool:
    """Whether a process ends, or is a zombie that its parent has yet to collect, in time."""
    try:
        process = psutil.Process(pid)
        deadline_s = time.monotonic() + timeout_s
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        pass
    return True


def assert_complete(run: ToyRun, num_steps: int) -> None:
    assert run.final["state"] == "SUCCEEDED", run.final
    assert set(run.steps()) == set(range(1, num_steps + 1))


def test_a_killed_rank_is_replaced_by_the_spare_and_the_spare_by_a_new_one(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "toy-a", kill_once(1), num_steps=150)
    assert_complete(run, 150)
    assert is_gone(run.harmed[0]["pid"])
    (decision,) = run.events("decision")
    assert decision["action"] == "replace"
    assert f"rank 1 on {run.harmed[0]['node']} was killed after step" in decision["message"]
    (recovered,) = run.events("recovered")
    assert recovered["resumed_step"] >= 5
    assert len(run.events("worker_created")) == 4, "2 ranks, the spare, and its successor"


def test_without_a_spare_the_rank_starts_again_in_its_place(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "toy-b", kill_once(0), num_steps=100, spec={"num_spares": 0})
    assert_complete(run, 100)
    assert [d["action"] for d in run.events("decision")] == ["restart"]


def test_the_job_shrinks_when_it_may_and_must(tmp_path: Path) -> None:
    spec = {"num_spares": 0, "restart_in_place": False, "min_workers": 1}
    run = ToyRun(tmp_path / "toy-c", kill_once(1), num_steps=100, spec=spec)
    assert_complete(run, 100)
    assert [d["action"] for d in run.events("decision")] == ["resize"]
    assert [len(g["ranks"]) for g in run.events("generation_started")] == [2, 1]


def test_too_many_failures_fail_the_job_with_the_rank_node_step_and_last_lines(
    tmp_path: Path,
) -> None:
    run = ToyRun(tmp_path / "toy-d", kill_once(1), num_steps=200, spec={"max_failures": 0})
    assert run.final["state"] == "FAILED"
    for part in ("rank 1", run.harmed[0]["node"], "after step", "last lines: step", "max_failures"):
        assert part in run.final["reason"]


def test_an_error_in_a_rank_restarts_all_and_names_it(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "toy-e", num_steps=60, raise_at=[(1, 20, 0)])
    assert_complete(run, 60)
    (decision,) = run.events("decision")
    assert decision["action"] == "restart"
    assert "rank 1" in decision["message"]
    assert "planted at step 20" in decision["message"]


def test_a_stopped_worker_is_found_by_its_silence(tmp_path: Path) -> None:
    spec = {"hang_timeout_s": 2.0}
    run = ToyRun(tmp_path / "toy-f", kill_once(1, signal.SIGSTOP), num_steps=150, spec=spec)
    assert_complete(run, 150)
    assert any("rank 1" in d["message"] for d in run.events("decision"))
    assert is_gone(run.harmed[0]["pid"]), "a stopped worker is ended, not left"


def test_a_dead_spare_is_replaced_without_a_new_generation(tmp_path: Path) -> None:
    run = ToyRun(tmp_path / "toy-g", kill_once(None), num_steps=250)
    assert_complete(run, 250)
    assert len(run.events("generation_started")) == 1
    assert any("spare" in e["message"] for e in run.events("worker_ended"))


def test_a_killed_controller_goes_on_with_the_same_workers(tmp_path: Path) -> None:
    def act(record: dict, run: ToyRun) -> None:
        if worker_of(record, 0) and not run.harmed:
            children = psutil.Process(run.process.pid).children(recursive=True)
            (controller,) = [c for c in children if "Controller" in " ".join(c.cmdline())]
            controller.kill()
            run.harmed.append(controller.pid)

    run = ToyRun(tmp_path / "toy-h", act, num_steps=200)
    assert_complete(run, 200)
    assert run.harmed
    assert len(run.events("controller_restarted")) == 1
    assert len(run.events("generation_started")) == 1, "the ranks never noticed"
    assert len(run.events("worker_created")) == 3


def test_cancel_ends_at_a_safe_point_and_leaves_no_process(tmp_path: Path) -> None:
    pids: list[int] = []

    def act(record: dict, run: ToyRun) -> None:
        if worker_of(record, 0) and not run.harmed:
            pids.extend(c.pid for c in psutil.Process(run.process.pid).children(recursive=True))
            run.harmed.append("SIGTERM")
            run.process.send_signal(signal.SIGTERM)

    run = ToyRun(tmp_path / "toy-i", act, num_steps=10_000)
    assert run.final["state"] == "CANCELLED"
    assert len(pids) > 5
    assert all(is_gone(pid) for pid in pids)
    assert not list(Path("/tmp").glob(f"gangline-ray-*/session_*_{run.process.pid}"))


def test_a_second_controller_of_a_run_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    from gangline.trainers.commit_files import FolderLock

    folder = tmp_path / "toy-j"
    folder.mkdir()
    lock = FolderLock(folder / ".controller.lock")
    run = ToyRun(folder, num_steps=10)
    assert run.process.returncode != 0
    assert "is held by another process" in run.errors
    assert not (folder / "journal.jsonl").exists()
    lock.release()
