"""SIGKILL of the appending and of the uploading process at random: nothing lost or doubled.

Each failure prints its seed; replay with `python tests/monitoring/test_kill.py SEED`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from gangline.monitoring.recording import Tracker
from gangline.monitoring.spool_cursor import num_delivered
from gangline.monitoring.spool_reader import SpoolReader
from gangline.monitoring.uploader_process import num_pending, spawn_uploader

HERE = Path(__file__).parent


def start_fake_uploader(spool: Path, store: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / "helper_fake_uploader.py"), "--spool", str(spool)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    start = {"uri": f"sqlite:///{store}", "interval_s": 0.01, "parent_pid": os.getpid()}
    tell(process, json.dumps(start))
    return process


def tell(process: subprocess.Popen[bytes], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n".encode())
    process.stdin.flush()


def append_until_killed(spool: Path, generation: int, first: int, seconds: float) -> list[int]:
    """Return the steps that were acknowledged before the SIGKILL, which is proven."""
    command = [sys.executable, str(HERE / "helper_appender.py")]
    command += [str(spool), str(generation), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first_line = process.stdout.readline()
        time.sleep(seconds)
        process.kill()
        rest = process.stdout.read()
        assert process.wait() == -signal.SIGKILL
    # A line cut by the kill is no acknowledgement.
    return [
        int(line) for line in (first_line + rest).splitlines(keepends=True) if line[-1:] == b"\n"
    ]


def run_appender_kills(tmp_path: Path, seed: int, num_kills: int) -> None:
    rng = random.Random(seed)
    acked: set[int] = set()
    expected_first: dict[int, set[int]] = {}
    first = 0
    for generation in range(1, num_kills + 1):
        steps = append_until_killed(tmp_path, generation, first, rng.uniform(0.0, 0.05))
        assert steps, "progress was made before the kill"
        acked |= set(steps)
        for step in steps:
            expected_first.setdefault(step, set()).add(generation)
        # As after a restart from a checkpoint: some steps are computed again.
        first = max(steps) // 10 * 10
    job: Counter[int] = Counter()
    attempts: Counter[tuple[int, int]] = Counter()
    for record in SpoolReader(tmp_path, on_event=lambda _: None).records():
        if record["type"] != "metrics":
            continue
        step, generation = record["step"], record["generation"]
        attempts[generation, step] += 1
        assert record["parent"] in (True, []), "all of a step's metrics or none belong to the job"
        if record["parent"]:
            job[step] += 1
            # An unacknowledged record may be first; it is of an earlier attempt then.
            assert generation <= min(expected_first.get(step, {generation})), f"{seed=} {step=}"
    assert set(job) >= acked, f"{seed=}: lost {sorted(acked - set(job))[:10]}"
    assert set(job.values()) == {1}, f"{seed=}: a step stands twice in the curve of the job"
    assert set(attempts.values()) == {1}, f"{seed=}"
    assert len(job) - len(acked) <= num_kills, "only what was in flight may be more than acked"
    assert max(job) == len(job) - 1, "the curve has no hole"


def run_uploader_kills(tmp_path: Path, seed: int, num_kills: int) -> tuple[int, int]:
    """Return how many points there are, and how many were sent more than once."""
    rng = random.Random(seed)
    spool, store = tmp_path / "spool", tmp_path / "store.db"
    tracker = Tracker(spool)
    tracker.start_run("kill-test", "kill", None, {}, {})
    tracker.start_attempt(1)
    uri = f"sqlite:///{store}"
    step, num_running = 0, 0
    for _ in range(num_kills):
        process = start_fake_uploader(spool, store)
        began = num_delivered(spool, uri)[0]
        give_up = time.monotonic() + 30
        deadline = None
        while deadline is None or time.monotonic() < deadline:
            tracker.log_metrics(step, {"train/loss": step / 7, "train/lr": 1.0}, generation=1)
            step += 1
            # The clock of the kill runs from the first delivery of this process.
            if deadline is None and num_delivered(spool, uri)[0] > began:
                deadline = time.monotonic() + rng.uniform(0.0, 0.1)
            assert time.monotonic() < give_up, "the uploader makes progress"
        process.kill()
        num_running += process.wait() == -signal.SIGKILL
        process.communicate()
    assert num_running == num_kills
    process = start_fake_uploader(spool, store)
    deadline = time.monotonic() + 60
    while num_pending(spool, uri) and time.monotonic() < deadline:
        time.sleep(0.02)
    tell(process, "stop")
    assert process.wait(10) == 0
    process.communicate()
    with contextlib.closing(sqlite3.connect(store)) as connection:
        runs = dict(connection.execute("select id, generation from runs").fetchall())
        rows = connection.execute("select run, key, step, value from points").fetchall()
        num_sends = connection.execute("select count(*) from sends").fetchone()[0]
    stored = Counter((runs[int(run)], key, s, value) for run, key, s, value in rows)
    expected = Counter(
        (generation, key, s, value)
        for generation in ("", "1")
        for s in range(step)
        for key, value in (("train/loss", s / 7), ("train/lr", 1.0))
    )
    assert stored == expected, f"{seed=}"
    return len(rows), num_sends - len(rows)


def test_kills_of_the_appender_lose_and_double_nothing(tmp_path):
    run_appender_kills(tmp_path, seed=1, num_kills=12)


def test_kills_of_the_uploader_lose_and_double_nothing(tmp_path):
    num_points, num_again = run_uploader_kills(tmp_path, seed=1, num_kills=8)
    assert num_points > 100
    assert num_again > 0, "no kill fell between the store's commit and ours: nothing was tested"


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_500_kills_of_each(tmp_path):
    seed = int(time.time())
    print(f"seed {seed}")
    for block in range(10):
        run_appender_kills(tmp_path / f"a{block}", seed + block, num_kills=50)
        _, num_again = run_uploader_kills(tmp_path / f"u{block}", seed + block, num_kills=50)
        assert num_again > 0


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_kills_of_the_real_uploader(tmp_path, database, outage):
    seed = int(time.time())
    print(f"seed {seed}")
    rng = random.Random(seed)
    spool, uri = tmp_path / "spool", f"sqlite:///{database}"
    tracker = Tracker(spool)
    tracker.start_run("kill-test", "kill", None, {}, {})
    tracker.start_attempt(1)
    step = 0
    for _ in range(60):
        uploader = spawn_uploader(spool, uri, tmp_path, interval_s=0.05)
        deadline = time.monotonic() + rng.uniform(0.5, 4.0)
        while time.monotonic() < deadline:
            tracker.log_metrics(step, {"train/loss": step / 7}, generation=1)
            step += 1
            time.sleep(0.001)
        os.killpg(uploader.pid, signal.SIGKILL)
        uploader.stop()
        assert uploader.poll() == -signal.SIGKILL
    uploader = spawn_uploader(spool, uri, tmp_path)
    assert uploader.wait_drained(60)
    uploader.stop()
    stored = outage.stored_points(database)
    expected = Counter(("train/loss", s, s / 7) for s in range(step))
    assert stored == {"": expected, "1": expected}, f"{seed=}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run_appender_kills(Path(folder) / "appender", int(sys.argv[1]), num_kills=50)
        print(run_uploader_kills(Path(folder) / "uploader", int(sys.argv[1]), num_kills=50))
