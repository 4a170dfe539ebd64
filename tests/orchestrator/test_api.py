"""The verbs from Python: what they return and what they raise."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from gangline.orchestrator import api
from gangline.orchestrator.errors import (
    GanglineError,
    InfeasibleError,
    JobFailedError,
    NotFoundError,
    TimedOutError,
    UnreachableError,
    UsageError,
)
from gangline.orchestrator.history import History
from gangline.orchestrator.job_errors import JobFileError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file, and a driver that ends as `reason` of the job's description says."""

    def run_job(*, run_dir: Path, on_record: Any, **more: Any) -> str:
        state = "FAILED" if "fails" in (run_dir / "job.yaml").read_text() else "SUCCEEDED"
        event = {"seq": 0, "time": 1.0, "event": "finished", "generation": 0, "message": state}
        (run_dir / "journal.jsonl").write_text(json.dumps(event) + "\n")
        (run_dir / "logs" / "rank-0.log").write_text("line\n")
        status = {"run_id": run_dir.name, "state": state, "step": 7, "updated_at": time.time()}
        (run_dir / "status.json").write_text(json.dumps({**status, "reason": "because"}))
        if on_record is not None:
            on_record({"type": "event", **event})
        return state

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gangline.orchestrator.driver.run_job", run_job)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (tmp_path / "moe.yaml").write_text("kind: train\n")
    return tmp_path / "moe.yaml"


def test_a_job_is_run_and_looked_at(file: Path) -> None:
    records: list[dict[str, Any]] = []
    started: list[api.JobInfo] = []
    watcher = api.Watcher(on_start=started.append, on_record=records.append)
    info = api.run(file, overrides=["training.steps=5"], watcher=watcher)
    assert info.check() is info
    assert (info.name, info.state, info.step) == ("moe", "SUCCEEDED", 7)
    assert started[0].state == "STARTING"
    assert [record["event"] for record in records] == ["finished"]
    assert [job.run_id for job in api.ls()] == [info.run_id]
    assert api.show("moe").run_id == api.wait("@last").run_id == info.run_id
    assert [record["text"] for record in api.logs("moe")] == ["line"]
    assert [record["event"] for record in api.events("moe")] == ["finished"]
    *_, last = api.follow("moe")
    assert (last["type"], last["state"]) == ("progress", "SUCCEEDED")
    assert "steps: 5" in (Path(info.run_dir) / "job.yaml").read_text()


def test_a_job_that_fails_raises_only_when_checked(file: Path) -> None:
    info = api.run(file, overrides=["description=fails"])
    assert info.state == "FAILED"
    with pytest.raises(JobFailedError, match="because"):
        info.check()
    again = api.resume(info.run_id, overrides=["description=goes well"])
    assert (again.run_id, again.state) == (info.run_id, "SUCCEEDED")


def test_jobs_are_chosen_by_state_and_number(file: Path) -> None:
    for name in ("a", "b", "c"):
        api.run(file, name=name, overrides=["description=fails"] if name == "b" else [])
    assert [job.name for job in api.ls()] == ["c", "b", "a"]
    assert [job.name for job in api.ls(states=["FAILED"])] == ["b"]
    assert [job.name for job in api.ls(limit=1)] == ["c"]


def test_each_error_has_its_type(file: Path, tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"training\.stepz"):
        api.run(file, overrides=["training.stepz=1"])
    with pytest.raises(NotFoundError):
        api.show("nobody")
    with pytest.raises(UnreachableError):
        api.submit(file, address="http://127.0.0.1:9")
    with pytest.raises(UsageError):
        api.submit(file, address="http://127.0.0.1:9/?x=1")
    info = api.run(file)
    History(tmp_path / "runs").update(info.run_id, state="RUNNING")
    running = {"run_id": info.run_id, "state": "RUNNING", "updated_at": time.time()}
    (Path(info.run_dir) / "status.json").write_text(json.dumps(running))
    with pytest.raises(TimedOutError):
        api.wait(info.run_id, timeout_s=0.1)
    with pytest.raises(GanglineError, match="nothing to resume"):
        api.resume(info.run_id)


def test_a_plan_writes_nothing(file: Path, tmp_path: Path) -> None:
    planned = api.plan(file, overrides=["workers.count=4", "training.batch_size=8"])
    assert planned.to_json()["workers"]["count"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["moe.yaml"]


def test_a_plan_can_be_held_against_a_cluster(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from .fake_head import SECRET, FakeHead

    head = FakeHead()
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    node = {"state": "ALIVE", "resources_total": {"CPU": 2.0, "memory": 8e9}}
    head.says("/api/v0/nodes?detail=1&limit=10000", {"data": {"result": {"result": [node]}}})
    assert api.plan(file, address=head.address).to_json()["fits_cluster"] is True
    with pytest.raises(InfeasibleError, match="1 node with 2 CPUs"):
        api.plan(file, overrides=["workers.count=4"], address=head.address)
    head.close()


def test_a_folder_out_of_sight_cannot_be_cancelled(file: Path, tmp_path: Path) -> None:
    info = api.run(file)
    History(tmp_path / "runs").update(info.run_id, state="RUNNING", run_dir=str(tmp_path / "gone"))
    with pytest.raises(GanglineError, match="is not here"):
        api.cancel(info.run_id)
