"""The records of a submitted job whose folder is not here, until it ends or is lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gangline.orchestrator import job_stream
from gangline.orchestrator.errors import ClusterError, TimedOutError
from gangline.orchestrator.history import History, new_row
from gangline.orchestrator.job_stream import detailed_info_of, stream, wait_for_end

from .fake_head import SECRET, FakeHead

RUN_ID = "moe-aaaaaa"
ALL = ("event", "progress", "log")


@pytest.fixture
def head() -> Iterator[FakeHead]:
    fake = FakeHead()
    yield fake
    fake.close()


@pytest.fixture
def history(tmp_path: Path, head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> History:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    table = History(tmp_path / "runs")
    row = new_row(RUN_ID, name="moe", kind="train", mode="submit", run_dir=Path("/not/here"))
    table.add(replace(row, address=head.address, submission_id=RUN_ID))
    return table


def tell(head: FakeHead, status: str, *records: dict[str, Any] | str, **job: Any) -> None:
    """Let the cluster say that the job is in this state and has printed these records."""
    head.says("/api/jobs/", [{"submission_id": RUN_ID, "status": status, **job}])
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    head.says(f"/api/jobs/{RUN_ID}/logs", {"logs": "".join(line + "\n" for line in lines)})


EVENT = {"type": "event", "time": 1.0, "event": "session_started", "generation": 0, "message": "m"}
STEP = {"type": "progress", "time": 2.0, "state": "RUNNING", "step": 5, "generation": 0}
END = {"type": "progress", "time": 3.0, "state": "SUCCEEDED", "step": 9, "generation": 0}


def test_waiting_running_and_the_end_are_told(history: History, head: FakeHead) -> None:
    tell(head, "PENDING", message="waiting for the runtime environment")
    records = stream(history, RUN_ID, types=ALL, ranks=None, until_end=True)
    first = next(records)
    assert (first["state"], first["reason"]) == ("QUEUED", "waiting for the runtime environment")
    tell(head, "RUNNING", "Running entrypoint", EVENT, STEP)
    entry_point, event, step = next(records), next(records), next(records)
    assert (entry_point["type"], entry_point["rank"]) == ("log", None)
    assert (event["event"], step["step"]) == ("session_started", 5)
    tell(head, "SUCCEEDED", "Running entrypoint", EVENT, STEP, END)
    rest = list(records)
    assert [record["state"] for record in rest] == ["SUCCEEDED"]


def test_a_driver_that_never_spoke_still_has_an_end(history: History, head: FakeHead) -> None:
    message = "Job entrypoint command failed\nModuleNotFoundError: No module named 'ray'\n"
    tell(head, "FAILED", message=message, driver_exit_code=1)
    (end,) = stream(history, RUN_ID, types=("progress",), ranks=None, until_end=True)
    assert end["state"] == "FAILED"
    assert "No module named 'ray'" in end["reason"]


def test_what_is_there_needs_no_end(history: History, head: FakeHead) -> None:
    tell(head, "RUNNING", EVENT, STEP)
    records = list(stream(history, RUN_ID, types=("event",), ranks=None, until_end=False))
    assert [record["event"] for record in records] == ["session_started"]


def test_a_cluster_that_is_away_for_a_while_is_borne_with(history: History, head: FakeHead) -> None:
    tell(head, "RUNNING", EVENT, STEP)
    answers, head.answers = head.answers, {}  # every path is now 404: no dashboard at all
    found: list[str] = []

    def follow() -> None:
        table = History(history.root)  # a connection belongs to its thread
        records = stream(table, RUN_ID, types=("event",), ranks=None, until_end=True)
        found.extend(str(record["event"]) for record in records)

    follower = threading.Thread(target=follow)
    follower.start()
    time.sleep(1.5)
    assert not found
    head.answers = answers
    tell(head, "SUCCEEDED", EVENT, STEP, END)
    follower.join(timeout=20.0)
    assert found == ["session_started"]


def test_a_cluster_that_stays_away_is_given_up(
    history: History, head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_stream, "CONTACT_TIMEOUT_S", 0.5)
    head.close()
    with pytest.raises(ClusterError, match="cannot reach"):
        list(stream(history, RUN_ID, types=ALL, ranks=None, until_end=True))
    with pytest.raises(ClusterError, match="cannot reach"):
        wait_for_end(history, RUN_ID, None)
    with pytest.raises(ClusterError, match="cannot reach"):
        list(stream(history, RUN_ID, types=ALL, ranks=None, until_end=False))
    assert history.get(RUN_ID).state == "QUEUED"  # that we lost sight of it is not stored


def test_the_end_is_waited_for(history: History, head: FakeHead) -> None:
    tell(head, "RUNNING")
    with pytest.raises(TimedOutError, match="still RUNNING"):
        wait_for_end(history, RUN_ID, 0.2)
    tell(head, "FAILED", message="m\n" + json.dumps({**END, "reason": "rank 1 was killed"}))
    info = wait_for_end(history, RUN_ID, 5.0)
    assert (info.state, info.reason) == ("FAILED", "rank 1 was killed")
    assert history.get(RUN_ID).state == "FAILED"


def test_details_come_from_what_the_driver_printed(history: History, head: FakeHead) -> None:
    tell(head, "RUNNING", EVENT, {**STEP, "state": "RECOVERING", "reason": "rank 1 was killed"})
    info = detailed_info_of(history, RUN_ID)
    assert (info.state, info.reason, info.step) == ("RECOVERING", "rank 1 was killed", 5)
    tell(head, "STOPPED", EVENT, STEP)
    info = detailed_info_of(history, RUN_ID)
    assert (info.state, info.step) == ("CANCELLED", 5)  # of the end the cluster knows better


def test_a_job_the_cluster_forgot_is_unknown(history: History, head: FakeHead) -> None:
    head.says("/api/jobs/", [])
    info = job_stream.info_of(history, RUN_ID)
    assert info.state == "UNKNOWN"
    assert f"gangline resume {RUN_ID}" in info.reason
