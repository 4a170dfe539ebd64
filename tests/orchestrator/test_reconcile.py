"""What a job is doing now, from the table, the run folder and the cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gangline.orchestrator.cluster import process_start
from gangline.orchestrator.errors import JobCancelledError, JobFailedError
from gangline.orchestrator.history import History, JobRow, new_row
from gangline.orchestrator.reconcile import JobInfo, ray_state, reconcile


def a_job(tmp_path: Path, **changes: Any) -> tuple[History, JobRow]:
    history = History(tmp_path)
    folder = tmp_path / "moe-aaaaaa"
    folder.mkdir()
    row = new_row("moe-aaaaaa", name="moe", kind="train", mode="run", run_dir=folder)
    pid = os.getpid()
    row = replace(row, driver_pid=pid, driver_start=process_start(pid))
    row = replace(row, **changes)
    history.add(row)
    return history, row


def write_status(row: JobRow, **fields: Any) -> None:
    status = {"run_id": row.run_id, "state": "RUNNING", "reason": "", "updated_at": 10.0, **fields}
    (Path(row.run_dir) / "status.json").write_text(json.dumps(status))


def now(history: History, row: JobRow) -> JobInfo:
    (info,) = reconcile(history, [history.get(row.run_id)])
    return info


def a_dead_process() -> tuple[int, str]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = process_start(process.pid)
    assert start is not None
    process.kill()
    process.wait()
    return process.pid, start


def test_the_status_file_tells_of_a_running_job(tmp_path: Path) -> None:
    history, row = a_job(tmp_path)
    assert now(history, row).state == "STARTING"  # nothing written yet
    write_status(row, step=7, num_steps=300, loss=2.5, workers=[{"rank": 0}])
    info = now(history, row)
    assert (info.state, info.step, info.loss, info.workers) == ("RUNNING", 7, 2.5, [{"rank": 0}])
    assert history.get(row.run_id).state == "RUNNING"


def test_a_job_whose_driver_is_gone_has_failed(tmp_path: Path) -> None:
    pid, start = a_dead_process()
    history, row = a_job(tmp_path, driver_pid=pid, driver_start=start)
    write_status(row, step=7)
    info = now(history, row)
    assert info.state == "FAILED"
    assert f"driver process {pid} is gone" in info.reason
    assert "gangline resume moe-aaaaaa" in info.reason
    assert info.step == 7
    assert history.get(row.run_id).state == "FAILED"


def test_another_process_of_the_same_pid_is_not_the_driver(tmp_path: Path) -> None:
    history, row = a_job(tmp_path, driver_start="1")  # our pid, but not our start
    write_status(row)
    assert now(history, row).state == "FAILED"


def test_a_zombie_is_not_alive(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    history, row = a_job(tmp_path, driver_pid=process.pid, driver_start=process_start(process.pid))
    write_status(row)
    assert now(history, row).state == "RUNNING"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
    assert now(history, row).state == "FAILED"
    process.wait()


def test_a_driver_that_ended_well_is_not_taken_for_lost(tmp_path: Path) -> None:
    pid, start = a_dead_process()
    history, row = a_job(tmp_path, driver_pid=pid, driver_start=start)
    write_status(row, state="SUCCEEDED", reason="finished")
    assert now(history, row).state == "SUCCEEDED"


def test_a_job_of_another_host_is_shown_as_last_seen(tmp_path: Path) -> None:
    history, row = a_job(tmp_path, host="elsewhere", driver_pid=1, driver_start="1")
    write_status(row)
    info = now(history, row)
    assert info.state == "RUNNING"
    assert "elsewhere" in info.reason


def test_a_status_of_an_earlier_attempt_is_not_believed(tmp_path: Path) -> None:
    history, row = a_job(tmp_path, status_after=10.0)
    write_status(row, state="FAILED", reason="the last time", step=50, updated_at=10.0)
    info = now(history, row)
    assert (info.state, info.reason) == ("STARTING", "")
    assert info.step == 50  # how far it got is still true
    write_status(row, state="RUNNING", updated_at=10.5)
    assert now(history, row).state == "RUNNING"


def test_a_status_of_another_run_is_not_believed(tmp_path: Path) -> None:
    history, row = a_job(tmp_path)
    write_status(row, run_id="moe-bbbbbb", state="FAILED")
    assert now(history, row).state == "STARTING"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"updated_at": null}'])
def test_a_status_that_cannot_be_read_changes_nothing(tmp_path: Path, content: str) -> None:
    history, row = a_job(tmp_path)
    (Path(row.run_dir) / "status.json").write_text(content)
    assert now(history, row).state == "STARTING"


def test_a_cluster_that_does_not_answer_makes_a_job_unknown_and_is_not_stored(
    tmp_path: Path,
) -> None:
    history, row = a_job(
        tmp_path, mode="submit", address="http://127.0.0.1:9", submission_id="s", state="RUNNING"
    )
    info = now(history, row)
    assert info.state == "UNKNOWN"
    assert "cannot reach" in info.reason
    assert not info.is_terminal
    assert history.get(row.run_id).state == "RUNNING"


def test_a_submitted_job_that_ended_needs_no_cluster(tmp_path: Path) -> None:
    history, row = a_job(tmp_path, mode="submit", address="http://127.0.0.1:9", submission_id="s")
    write_status(row, state="SUCCEEDED")
    assert now(history, row).state == "SUCCEEDED"


REASON = json.dumps(
    {"type": "progress", "time": 1, "state": "FAILED", "reason": "rank 1 was killed"}
)


@pytest.mark.parametrize(
    ("job", "state", "reason"),
    [
        ({"status": "PENDING", "message": "waiting\nmore"}, "QUEUED", "waiting"),
        ({"status": "RUNNING", "message": "m"}, "RUNNING", ""),
        ({"status": "STOPPED"}, "CANCELLED", ""),
        ({"status": "SUCCEEDED"}, "SUCCEEDED", ""),
        ({"status": "FAILED", "message": f"head\n{REASON}\nbye"}, "FAILED", "rank 1 was killed"),
        ({"status": "FAILED", "message": "head\nModuleNotFoundError: x\n"}, "FAILED", "Module"),
        ({"status": "FAILED", "message": "Runtime env failed"}, "FAILED", "Runtime env failed"),
        ({"status": "FAILED", "driver_exit_code": 103, "message": "h"}, "CANCELLED", "cancelled"),
        ({"status": "NEW WORD"}, "UNKNOWN", ""),
        ({}, "UNKNOWN", ""),
    ],
)
def test_rays_words_are_translated(job: dict[str, Any], state: str, reason: str) -> None:
    got_state, got_reason = ray_state(job)
    assert got_state == state
    assert got_reason.startswith(reason)


def test_a_job_can_be_checked(tmp_path: Path) -> None:
    history, row = a_job(tmp_path)
    write_status(row, state="SUCCEEDED")
    info = now(history, row)
    assert info.check() is info
    with pytest.raises(JobFailedError, match="moe-aaaaaa FAILED: why"):
        replace(info, state="FAILED", reason="why").check()
    with pytest.raises(JobCancelledError):
        replace(info, state="CANCELLED").check()
