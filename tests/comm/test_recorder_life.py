"""Rings can be read while their rank is stopped, holds the GIL, or is dead; none is left over."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gangline.comm import recorder_build, ring_folders
from gangline.comm import ring_format as fmt
from gangline.comm.events import Op, Ring, State, list_rings
from gangline.comm.recorder_fallback import _RingWriter
from gangline.comm.ring_folders import FolderHold, drop_oldest_dead, ring_folder, sweep

SCENARIOS = Path(__file__).with_name("recorder_scenarios.py")
BOTH = pytest.mark.parametrize("recorder", ["c++", "python"])


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    try:
        recorder_build.build()
    except recorder_build.BuildError as error:
        pytest.skip(f"no C++ recorder: {error}")


@pytest.fixture
def run(rank_pool, tmp_path):
    """Run a scenario on two ranks that record below tmp_path."""

    def run(scenario, *, recorder="c++", num_ranks=2, **kwargs):
        kwargs.setdefault("folder", str(tmp_path / "rings" / "run"))
        if recorder is not None:
            kwargs["is_fallback"] = recorder == "python"
        port = rank_pool.store_port(num_ranks)
        return rank_pool.run(num_ranks, (SCENARIOS, scenario), port=port, **kwargs)

    return run


@pytest.mark.ranks
@BOTH
def test_a_stopped_rank_is_read(run, recorder):
    found, _ = run("read_while_stopped", recorder=recorder)
    assert found["state"] == "T"
    assert found["is_alive"] is True
    (event,) = found["open"]
    assert (event["op"], event["peer"], event["state"]) == ("RECV", 0, "OPEN")
    assert found["events"] >= 3
    assert found["read_s"] < 1.0
    assert found["open later"] is True


@pytest.mark.ranks
def test_the_end_of_an_operation_is_seen_though_its_rank_holds_the_gil(run):
    looked, held = run("read_while_gil_is_held")
    start_ns, end_ns = held["held"]
    assert end_ns - start_ns > 1.9e9
    assert looked["states"] == ["DONE", "DONE"]
    assert looked["seen_ns"] < end_ns, "the GIL was held when it was seen"
    assert start_ns < held["end_ns"] < end_ns - 0.5e9


@pytest.mark.ranks
def test_the_fallback_stamps_such_an_end_when_the_gil_is_free(run):
    looked, held = run("read_while_gil_is_held", recorder="python")
    assert looked["states"] == ["DONE", "OPEN"]
    assert looked["seen_ns"] < held["end_ns"]


@pytest.mark.ranks
@BOTH
def test_a_killed_rank_is_read_until_the_run_ends(run, recorder):
    found, died = run("read_after_a_kill", recorder=recorder, may_die=(1,), dies=[1])
    assert died is None
    assert found["is_alive"] is False
    (event,) = found["open"]
    assert (event["op"], event["peer"]) == ("RECV", 0)
    assert found["events"] >= 3
    assert found["error"]
    assert (found["mine"]["op"], found["mine"]["state"]) == ("RECV", "FAILED")
    assert found["rings left"] == 0, "rank 0 was the last of the run, and ended in order"


@pytest.mark.ranks
def test_when_all_are_killed_the_next_run_clears_up(run, tmp_path):
    run("read_after_a_kill", may_die=(0, 1), dies=[0, 1])
    folder = tmp_path / "rings" / "run"
    dead = list(list_rings(folder))
    assert len(dead) == 2
    for path in dead:
        with Ring.open(path) as ring:
            assert ring.writer_is_alive() is False
            assert len(ring.events()) > 0
    hold = FolderHold(tmp_path / "rings" / "next")
    assert not folder.exists()
    hold.release()
    assert list((tmp_path / "rings").iterdir()) == []


@pytest.mark.ranks
@BOTH
def test_joining_and_leaving_holds_on_to_nothing(run, recorder, tmp_path):
    for found in run("join_and_leave", recorder=recorder, num_cycles=20, timeout_s=120):
        counts = found["counts"]
        assert {count["rings in use"] for count in counts} == {2}, "world and checkpoint"
        assert {count["rings"] for count in counts} == {0}
        assert {count["mapped"] for count in counts} == {0}
        assert counts[-1]["fds"] <= counts[4]["fds"]
        assert counts[-1]["threads"] <= counts[4]["threads"]
        # A ring that stayed mapped would show above; what else a group has, here.
        assert counts[-1]["KiB"] - counts[4]["KiB"] < 15 * 40
        assert found["fds at the end"] < counts[-1]["fds"]
    assert list((tmp_path / "rings").iterdir()) == []


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("make", "max_file_bytes", "words"),
    [
        pytest.param(lambda root: "/proc/no/where", 0, "/proc/no", id="no place for it"),
        pytest.param(
            lambda root: str(root / "open" / "run"), 0, "only this user", id="not private"
        ),
        pytest.param(lambda root: str(root / "run"), 8192, "File too large", id="no memory left"),
    ],
)
def test_without_rings_training_goes_on_with_one_warning(
    run, tmp_path, make, max_file_bytes, words
):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for warnings in run(
        "train_without_a_folder",
        recorder=None,
        folder=make(tmp_path),
        max_file_bytes=max_file_bytes,
    ):
        (warning,) = warnings
        assert warning.startswith("communication is not recorded: ")
        assert words in warning


@pytest.mark.ranks
def test_install_twice_in_another_folder_and_not_any_more(run):
    for found in run("install_twice_and_change", recorder=None):
        assert found == {
            "before": 2,
            "after": 0,
            "other": 1,
            "after a fork's end": 1,
            "after uninstall": False,
            "not recorded": 0,
        }


SCRIPT = """
import multiprocessing, os, sys
import torch.distributed as dist
from gangline.comm import recorder
from gangline.comm.events import list_rings

def rank(folder, how):
    recorder.install(folder)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.barrier()
    assert len(list(list_rings(folder))) == 1
    if how == "destroyed":
        dist.destroy_process_group()
        assert len(list(list_rings(folder))) == 0
    if how == "raised":
        sys.exit(3)

root, *hows = sys.argv[1:]
for how in hows:  # each in a fork, for torch is slow to import
    pid = os.fork()
    if pid == 0:
        if how == "child":
            fork = multiprocessing.get_context("fork")
            child = fork.Process(target=rank, args=(f"{root}/{how}", how))
            child.start()
            child.join()
            sys.exit(child.exitcode)
        rank(f"{root}/{how}", how)
        sys.exit(0)
    print(how, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.path.exists(f"{root}/{how}"))
"""


@pytest.mark.ranks
def test_a_process_that_ends_in_order_leaves_nothing(tmp_path):
    root = tmp_path / "rings"
    root.mkdir(mode=0o700)
    command = [sys.executable, "-u", "-c", SCRIPT, root]
    done = subprocess.run(
        [*command, "destroyed", "forgotten", "raised", "child"], capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert lines == ["destroyed 0 False", "forgotten 0 False", "raised 3 False", "child 0 False"], (
        done.stderr
    )
    assert list(root.iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
from gangline.comm.ring_folders import FolderHold
hold = FolderHold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_stays_while_any_process_holds_it(tmp_path):
    root = tmp_path / "rings"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, root / "run"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert sweep(root) == []
        mine = FolderHold(root / "run")
        make_ring(root / "run" / "1-1.ring", pid=holder.pid)
        mine.release()
        assert (root / "run" / "1-1.ring").exists(), "the other process still holds it"
        os.kill(holder.pid, signal.SIGSTOP)
        assert sweep(root) == [], "a stopped process holds on"
    finally:
        holder.kill()
        holder.wait()
    assert sweep(root) == [root / "run"]
    assert not (root / "run").exists()


def make_ring(path, **changes):
    values: dict[str, Any] = {
        "pid": os.getpid(), "start_ticks": 1, "pid_namespace": fmt.pid_namespace(), "host": "",
        "label": "", "rank": 0, "group": "", "group_desc": "", "ranks": (), "group_rank": 0,
        "group_size": 1, "backend": "", "devices": (), "recorder": "", "recorder_reason": "",
        "torch": "", "realtime_offset_ns": 0,
    }  # fmt: skip
    fmt.create_ring(path, fmt.RingInfo(**(values | changes)), capacity=2)


def test_only_folders_of_rings_are_ever_removed(tmp_path):
    root = tmp_path / "rings"
    FolderHold(root / "run").forget()
    (root / "other").mkdir()
    (root / "other" / "thesis.ring").write_text("not ours")
    (root / "run" / "notes").write_text("somebody put it here")
    (tmp_path / "elsewhere").mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    assert sweep(root) == []
    assert (root / "other" / "thesis.ring").exists()
    assert (root / "run" / "notes").exists()
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("before", ["lstat", "open", "flock"])
def test_a_hold_that_meets_a_sweep_makes_the_folder_anew(tmp_path, monkeypatch, before):
    root = tmp_path / "rings"
    FolderHold(root / "run").forget()  # as a dead process leaves it
    module = fcntl if before == "flock" else os
    original = getattr(module, before)
    sweeps: list[int] = []

    def sweep_first(place, *args, **kwargs):
        is_ours = args == (fcntl.LOCK_SH,) if before == "flock" else place == root / "run"
        if is_ours and not sweeps:
            sweeps.append(1)
            assert ring_folders._remove_unless_held(root / "run")
        return original(place, *args, **kwargs)

    hold = FolderHold.__new__(FolderHold)
    hold.folder = root / "run"
    monkeypatch.setattr(module, before, sweep_first)
    hold._fd = ring_folders._hold(root / "run")
    assert sweeps == [1]
    assert (root / "run").exists()
    assert sweep(root) == []
    hold.release()
    assert not (root / "run").exists()


HOLD_AND_RELEASE = """
import sys, time
from pathlib import Path
from gangline.comm.ring_folders import FolderHold
end_s, num = time.monotonic() + 1.5, 0
while time.monotonic() < end_s:
    hold = FolderHold(Path(sys.argv[1]))
    mine = hold.folder / f"{sys.argv[2]}-1.ring"
    mine.write_text("")
    assert mine.exists()
    mine.unlink()
    hold.release()
    num += 1
print(num)
"""


def test_processes_that_come_and_go_at_once_do_not_lose_the_folder(tmp_path):
    folder = tmp_path / "rings" / "run"
    command = [sys.executable, "-c", HOLD_AND_RELEASE, folder]
    children = [
        subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(3)
    ]
    counts = [int(child.communicate(timeout=60)[0] or 0) for child in children]
    assert all(count > 10 for count in counts), counts
    assert not folder.exists()


def test_a_job_that_dies_again_and_again_fills_no_memory(tmp_path):
    root = tmp_path / "rings"
    hold = FolderHold(root / "run")
    for number in range(6):
        make_ring(root / "run" / f"7-{number}.ring")  # of a process that started at another time
        time.sleep(0.001)
    alive = root / "run" / "8-1.ring"
    make_ring(alive, start_ticks=fmt.start_ticks(os.getpid()))
    elsewhere = root / "run" / "9-1.ring"
    make_ring(elsewhere, pid_namespace=1)  # who can tell?
    (root / "run" / "broken.ring").write_text("")
    drop_oldest_dead(root / "run", num_kept=2)
    left = sorted(path.name for path in list_rings(root / "run"))
    assert left == ["7-4.ring", "7-5.ring", "8-1.ring", "9-1.ring", "broken.ring"]
    with Ring.open(elsewhere) as ring:
        assert ring.writer_is_alive() is None
    with Ring.open(alive) as ring:
        assert ring.writer_is_alive() is True
        assert ring.events()["state"].tolist() == [State.OPEN] * 0
    hold.release()


def test_a_run_has_one_folder_whatever_its_name(tmp_path):
    folder = ring_folder("/data/runs/my run: 7")
    assert folder.parent == ring_folders.rings_root()
    assert folder.name.startswith("my_run__7-")
    assert folder == ring_folder("/data/runs/../runs/my run: 7")
    assert folder != ring_folder("/elsewhere/my run: 7")
    assert len(ring_folder("/x/" + "y" * 300).name) < 100


def test_the_example_of_the_docs_runs(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "recorder.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    hold = FolderHold(ring_folder(tmp_path / "run"))
    try:
        path = hold.folder / "1-1.ring"
        make_ring(path, rank=3, group_desc="dp", group_size=2, ranks=(3, 4))
        writer = _RingWriter(path, (3, 4), 2, has_ends=True)
        writer.end(writer.begin(Op.SEND, 1, 640, 6), fmt.DONE)
        writer.begin(Op.BARRIER, -1, 0, -1)
        command = [sys.executable, "-c", code, tmp_path / "run"]
        lines = subprocess.check_output(command, text=True).splitlines()
    finally:
        hold.release()
    assert lines[0] == "rank 3 dp: 1 of 2 ended"
    assert lines[1].startswith("  1 SEND 640 B, peer 4: DONE ")
    assert lines[2] == "  2 BARRIER 0 B, peer -1: OPEN None"
