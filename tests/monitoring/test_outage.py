"""A real tracking server that is killed, hangs, cuts answers off, answers late or with 500."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gangline.monitoring.recording import Tracker
from gangline.monitoring.uploader_process import UploaderProcess, spawn_uploader

STEPS_PER_S = 50


class Job:
    """Logs a step every 20 ms from a thread, as a controller would, and knows what it logged."""

    def __init__(self, spool, run_id: str) -> None:
        self.latencies_s: list[float] = []
        self.num_steps = 0
        self.artifact = spool.parent / f"{run_id}.txt"
        self.tracker = Tracker(spool)
        self.tracker.start_run(run_id, "job", run_id, {"a": 1}, {}, {"path": "/d", "digest": "d"})
        self.tracker.start_attempt(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(1 / STEPS_PER_S):
            began = time.perf_counter()
            values = {"train/loss": self.num_steps / 7, "train/lr": 0.5}
            assert self.tracker.log_metrics(self.num_steps, values, generation=1)
            self.latencies_s.append(time.perf_counter() - began)
            self.num_steps += 1

    def end(self) -> None:
        self.join()
        self.artifact.write_text("made by the job")
        self.tracker.log_artifact(self.artifact, "files")
        self.tracker.end_run("SUCCEEDED")
        self.tracker.close()

    def join(self) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def running(spool: Path, run_id: str, uri: str) -> Iterator[tuple[Job, UploaderProcess]]:
    """Yield a job that logs and its uploader; end both whatever happens."""
    with contextlib.ExitStack() as cleanup:
        job = Job(spool, run_id)
        cleanup.callback(job.join)
        uploader = spawn_uploader(
            spool, uri, interval_s=0.2, request_timeout_s=1, max_backoff_s=0.5
        )
        cleanup.callback(uploader.stop)
        yield job, uploader


def end_and_drain(job: Job, uploader: UploaderProcess) -> None:
    job.end()
    assert uploader.wait_drained(60), uploader.log_path.read_text()


def points_of(server: Any, run_id: str) -> dict[str, Counter]:
    """Return the points of a job by generation, counted over all runs that carry its tags."""
    query = (
        "select g.value, m.key, m.step, m.value from metrics m"
        " join tags j on j.run_uuid = m.run_uuid and j.key = 'gangline.run_id'"
        " join tags g on g.run_uuid = m.run_uuid and g.key = 'gangline.generation'"
        " where j.value = ?"
    )
    found: dict[str, Counter] = {"": Counter(), "1": Counter()}
    with contextlib.closing(sqlite3.connect(server.database, timeout=30)) as connection:
        for generation, key, step, value in connection.execute(query, (run_id,)):
            found[generation][key, step, value] += 1
    return found


def runs_of(server: Any, run_id: str) -> int:
    """Return how many runs the job has, deleted ones included."""
    query = "select count(*) from tags where key = 'gangline.run_id' and value = ?"
    with contextlib.closing(sqlite3.connect(server.database, timeout=30)) as connection:
        return int(connection.execute(query, (run_id,)).fetchone()[0])


def num_inputs(server: Any, run_id: str) -> int:
    query = (
        "select count(*) from inputs i join tags j on j.run_uuid = i.destination_id"
        " where j.key = 'gangline.run_id' and j.value = ?"
    )
    with contextlib.closing(sqlite3.connect(server.database, timeout=30)) as connection:
        return int(connection.execute(query, (run_id,)).fetchone()[0])


def active_runs(server: Any, run_id: str) -> list[str]:
    query = (
        "select r.name from runs r join tags j on j.run_uuid = r.run_uuid"
        " where j.key = 'gangline.run_id' and j.value = ? and r.lifecycle_stage = 'active'"
    )
    with contextlib.closing(sqlite3.connect(server.database, timeout=30)) as connection:
        return sorted(name for (name,) in connection.execute(query, (run_id,)))


def check(server: Any, job: Job, run_id: str) -> None:
    expected = Counter(
        point
        for step in range(job.num_steps)
        for point in (("train/loss", step, step / 7), ("train/lr", step, 0.5))
    )
    assert points_of(server, run_id) == {"": expected, "1": expected}
    assert active_runs(server, run_id) == sorted(["job-attempt-1", run_id])
    uploaded = list(server.folder.rglob(f"files/{job.artifact.name}"))
    assert [path.read_text() for path in uploaded] == ["made by the job"]
    assert num_inputs(server, run_id) == 1
    # A step waits for the disk alone: no latency comes near a request's time-out.
    assert max(job.latencies_s) < 0.5


def run_fault(proxy: Any, server: Any, tmp_path: Path, mode: str, seconds: float) -> None:
    run_id = f"fault-{mode}"
    with running(tmp_path / "spool", run_id, proxy.uri) as (job, uploader):
        proxy.mode = mode  # from the first request on: opening the runs is hit as well
        time.sleep(seconds)
        proxy.mode = "pass"
        time.sleep(0.5)
        proxy.mode = mode
        time.sleep(seconds)
        proxy.mode = "pass"
        end_and_drain(job, uploader)
    assert proxy.num_faults[mode] > 0, "the fault happened"
    assert "trying again" in uploader.log_path.read_text()
    check(server, job, run_id)


@pytest.mark.parametrize(("mode", "seconds"), [("hang", 1.8), ("error", 1.0)])
def test_server_that_hangs_or_fails(proxy, server, tmp_path, mode, seconds):
    run_fault(proxy, server, tmp_path, mode, seconds)


# The job creates two runs, so two answers can be cut; of batches there are as many as we wait for.
@pytest.mark.parametrize(("request_name", "num_cuts"), [("runs/create", 2), ("runs/log-batch", 4)])
def test_answers_cut_off_after_the_request_was_executed(
    proxy, server, tmp_path, request_name, num_cuts
):
    proxy.only = request_name.encode()
    run_id = "cut-" + request_name.rpartition("/")[2]
    with running(tmp_path / "spool", run_id, proxy.uri) as (job, uploader):
        before = server.num_requests(request_name)
        proxy.mode = "drop"
        deadline = time.monotonic() + 60
        while proxy.num_faults["drop"] < num_cuts and time.monotonic() < deadline:
            time.sleep(0.05)
        proxy.mode = "pass"
        end_and_drain(job, uploader)
    assert proxy.num_faults["drop"] >= num_cuts
    assert server.num_requests(request_name) - before >= num_cuts, "they were executed"
    assert "trying again" in uploader.log_path.read_text()
    check(server, job, run_id)
    assert runs_of(server, run_id) == 2, "no run was made twice, not even for a while"


@pytest.mark.nightly
def test_requests_executed_after_the_uploader_gave_up(proxy, server, tmp_path):
    proxy.delay_s = 1.2
    run_fault(proxy, server, tmp_path, "late", seconds=3.0)


@pytest.mark.nightly
def test_runs_created_twice_by_late_requests_become_one(proxy, server, tmp_path):
    proxy.delay_s = 2.5  # over two time-outs: the second attempt cannot see the first one's run
    proxy.only = b"runs/create"
    with running(tmp_path / "spool", "created-twice", proxy.uri) as (job, uploader):
        proxy.mode = "late"
        deadline = time.monotonic() + 60
        while len(active_runs(server, "created-twice")) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        proxy.mode = "pass"
        # What is executed after the job's end can no longer be tidied up.
        time.sleep(proxy.delay_s + 0.5)
        end_and_drain(job, uploader)
    assert "empty runs that a late answer had left behind" in uploader.log_path.read_text()
    assert runs_of(server, "created-twice") > 2
    check(server, job, "created-twice")


def test_server_killed_and_restarted(server, tmp_path):
    with running(tmp_path / "spool", "fault-killed", server.uri) as (job, uploader):
        wait_until_delivering(uploader, job)
        num_before = len(job.latencies_s)
        server.kill()
        time.sleep(1.0)
        assert not server.is_ready()
        num_down = len(job.latencies_s) - num_before
        server.start()
        end_and_drain(job, uploader)
    assert num_down > STEPS_PER_S // 5, "the job went on while the server was down"
    check(server, job, "fault-killed")


def wait_until_delivering(uploader: UploaderProcess, job: Job) -> None:
    deadline = time.monotonic() + 60
    while job.num_steps - uploader.pending() < STEPS_PER_S // 2:
        assert time.monotonic() < deadline, uploader.log_path.read_text()
        time.sleep(0.1)


@pytest.mark.nightly
@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_minute_long_outage(outage: ModuleType, fault):
    result = outage.run_outage_bench(60, fault)
    assert result["fault_happened"]
    assert result["drained"]
    for run in ("run_job", "run_1"):
        assert (result[run]["missing"], result[run]["doubled"]) == (0, 0)
    during = result["append"]["during"]
    assert during["job"]["p50_us"] < 1.5 * during["control"]["p50_us"]
    assert during["job"]["p99_us"] < 2 * during["control"]["p99_us"] + 1000
