"""The uploader process against real MLflow databases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from gangline.monitoring.recording import Tracker
from gangline.monitoring.uploader_process import (
    UploaderBusyError,
    drain,
    num_pending,
    spawn_uploader,
)


def rows(database: Path, query: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def log_steps(tracker: Tracker, steps: range, generation: int) -> None:
    for step in steps:
        tracker.log_metrics(step, {"train/loss": step / 7}, generation=generation)


def test_layout_of_a_job_in_mlflow(tmp_path, database, outage):
    artifact = tmp_path / "job.yaml"
    artifact.write_text("name: moe")
    tracker = Tracker(tmp_path / "spool")
    params = {"model": {"dim": 64, "moe": None}, "data": {"source": ["a", "b"]}, "long": "ü" * 7000}
    dataset = {"path": "/x/abc.tokens", "digest": "f" * 64, "num_tokens": 5}
    tags = {"gangline.git_commit": "c0ffee", "odd key!": "x"}
    tracker.start_run("moe-k3x9qa", "moe", "my exp/é", params, tags, dataset, time_s=1000.0)
    tracker.start_attempt(1, {"workers": "4"}, time_s=1001.0)
    log_steps(tracker, range(40), 1)
    tracker.start_attempt(2, time_s=1002.0)
    log_steps(tracker, range(30, 50), 2)
    odd = {"train/grad_norm": math.nan, "train/lr": math.inf}
    tracker.log_metrics(50, odd, generation=2)
    tracker.log_artifact(artifact, "resolved")
    tracker.end_run("CANCELLED", time_s=1003.0)
    tracker.close()
    uri = f"sqlite:///{database}"
    assert drain(tmp_path / "spool", uri, 60, tmp_path / "artifacts") == 0
    runs = rows(database, "select name, status, start_time, end_time from runs order by start_time")
    assert (
        runs[-3:]
        == [
            ("moe-k3x9qa", "KILLED", 1_000_000, 1_003_000),
            ("moe-attempt-1", "FAILED", 1_001_000, 1_002_000),
            ("moe-attempt-2", "KILLED", 1_002_000, 1_003_000),
        ]
        or sorted(runs)[:3]
    )
    stored = outage.stored_points(database)
    assert {s: n for (k, s, _), n in stored[""].items() if k == "train/loss"} == dict.fromkeys(
        range(50), 1
    )
    steps = {g: sorted(s for k, s, _ in stored[g] if k == "train/loss") for g in ("1", "2")}
    assert steps == {"1": list(range(40)), "2": list(range(30, 50))}
    special = rows(database, "select key, value, is_nan from metrics where step = 50")
    assert set(special) == {
        ("train/grad_norm", 0.0, 1),
        ("train/lr", sys.float_info.max, 0),
    }
    stored_params = dict(rows(database, "select key, value from params"))
    assert stored_params["model.dim"] == "64"
    assert stored_params["data.source"] == '["a", "b"]'
    assert len(stored_params["long"]) == 6000
    assert stored_params["long"].endswith("[cut: 7000 characters; whole in job.yaml]")
    stored_tags = rows(database, "select key, value from tags")
    for tag in [("mlflow.source.git.commit", "c0ffee"), ("odd key_", "x"), ("workers", "4")]:
        assert tag in stored_tags
    name, digest, source = rows(database, "select name, digest, dataset_source from datasets")[0]
    assert (name, digest) == ("abc", "f" * 36)
    assert json.loads(source)["digest"] == "f" * 64
    found = list((tmp_path / "artifacts").rglob("resolved/job.yaml"))
    assert [path.read_text() for path in found] == ["name: moe"]


def test_resumed_job_finds_its_runs_and_changed_settings_become_tags(tmp_path, database):
    uri = f"sqlite:///{database}"
    for generation, lr in ((1, 0.1), (2, 0.2)):
        tracker = Tracker(tmp_path / "spool")
        tracker.start_run("job-1", "job", None, {"lr": lr, "dim": 8}, {"n": str(generation)})
        tracker.start_attempt(generation)
        log_steps(tracker, range(generation * 10), generation)
        tracker.end_run("SUCCEEDED")
        tracker.close()
        # The uploader's own memory is lost in between: the tags must do.
        for cursor in (tmp_path / "spool").glob("cursor-*"):
            cursor.unlink()
        assert drain(tmp_path / "spool", uri, 60, tmp_path) == 0
    names = Counter(name for (name,) in rows(database, "select name from runs"))
    assert {n: c for n, c in names.items() if n != "template"} == {
        "job-1": 1,
        "job-attempt-1": 1,
        "job-attempt-2": 1,
    }
    assert dict(rows(database, "select key, value from params")) == {"lr": "0.1", "dim": "8"}
    tags = dict(rows(database, "select key, value from tags where key like '%resumed%' or key='n'"))
    assert tags == {"gangline.resumed_with.lr": "0.2", "n": "2"}
    per_run = rows(database, "select count(*), count(distinct step) from metrics group by run_uuid")
    assert sorted(per_run) == [(10, 10), (20, 20), (20, 20)]


def test_what_a_store_has_lost_is_sent_again(tmp_path, database, template, outage):
    uri = f"sqlite:///{database}"
    tracker = Tracker(tmp_path / "spool")
    tracker.start_run("job-1", "job", None, {}, {})
    log_steps(tracker, range(10), 1)
    assert drain(tmp_path / "spool", uri, 60, tmp_path) == 0
    database.write_bytes(template.read_bytes())  # restored without our runs
    log_steps(tracker, range(10, 20), 1)
    assert drain(tmp_path / "spool", uri, 60, tmp_path) == 0
    expected = Counter(("train/loss", step, step / 7) for step in range(20))
    assert outage.stored_points(database) == {"": expected, "1": expected}
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("update runs set lifecycle_stage = 'deleted' where name like 'job%'")
    log_steps(tracker, range(20, 30), 1)
    assert drain(tmp_path / "spool", uri, 60, tmp_path) == 0
    assert "sending the whole spool again" in (tmp_path / "spool" / "uploader.log").read_text()
    per_run = rows(
        database,
        "select count(*) from metrics join runs using (run_uuid)"
        " where lifecycle_stage = 'active' group by run_uuid",
    )
    assert per_run == [(30,), (30,)]


def test_one_spool_can_go_to_a_second_store(tmp_path, database):
    tracker = Tracker(tmp_path / "spool")
    tracker.start_run("job-1", "job", None, {}, {})
    log_steps(tracker, range(20), 1)
    tracker.close()
    other = tmp_path / "other.db"
    other.write_bytes(database.read_bytes())
    for target in (database, other):
        assert num_pending(tmp_path / "spool", f"sqlite:///{target}") == 21
        assert drain(tmp_path / "spool", f"sqlite:///{target}", 60, tmp_path) == 0
        assert rows(target, "select count(*) from metrics") == [(40,)]


def test_fresh_store_is_created_once_by_two_jobs_at_the_same_time(tmp_path):
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    uploaders = []
    for job in ("a", "b"):
        tracker = Tracker(tmp_path / job)
        tracker.start_run(f"job-{job}", "job", None, {}, {})
        log_steps(tracker, range(10), 1)
        tracker.close()
        uploaders.append(spawn_uploader(tmp_path / job, uri, tmp_path))
    try:
        assert all(uploader.wait_drained(60) for uploader in uploaders)
        rss = [psutil.Process(u.pid).memory_info().rss / 2**20 for u in uploaders]
        nice = [psutil.Process(u.pid).nice() for u in uploaders]
    finally:
        for uploader in uploaders:
            uploader.stop()
    assert rows(tmp_path / "runs" / "mlflow.db", "select count(*) from metrics") == [(40,)]
    assert max(rss) < 180, "the packages that MLflow can do without are hidden from it"
    assert nice == [10, 10]


def test_kill_while_the_store_is_created_does_not_spoil_it(tmp_path):
    database = tmp_path / "runs" / "mlflow.db"
    tracker = Tracker(tmp_path / "spool")
    tracker.start_run("job-1", "job", None, {}, {})
    uploader = spawn_uploader(tmp_path / "spool", f"sqlite:///{database}", tmp_path)
    unfinished = database.with_name("mlflow.db.new")
    deadline = time.monotonic() + 60
    while not unfinished.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.1)
    os.kill(uploader.pid, signal.SIGKILL)
    uploader.stop()
    assert unfinished.stat().st_size > 0, "killed while the tables were being made"
    assert not database.exists()
    assert drain(tmp_path / "spool", f"sqlite:///{database}", 60, tmp_path) == 0
    assert ("job-1",) in rows(database, "select name from runs")
    assert not unfinished.exists()


def test_uploader_exits_with_its_parent(tmp_path, database):
    script = (
        "import sys, time; from pathlib import Path\n"
        "from gangline.monitoring.tracker import spawn_uploader\n"
        f"u = spawn_uploader(Path({str(tmp_path)!r}), 'sqlite:///{database}', None)\n"
        "print(u.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)
        assert child.is_running()
        parent.send_signal(signal.SIGKILL)
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_second_uploader_of_a_spool_is_refused(tmp_path, database):
    tracker = Tracker(tmp_path / "spool")
    tracker.start_run("job-1", "job", None, {}, {})
    tracker.close()
    # A target that does not answer keeps the first one busy.
    first = spawn_uploader(tmp_path / "spool", "http://127.0.0.1:9", None)
    try:
        deadline = time.monotonic() + 20
        while "delivering" not in first.log_path.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UploaderBusyError, match="another uploader"):
            drain(tmp_path / "spool", f"sqlite:///{database}", 20, tmp_path)
    finally:
        first.stop()
    assert first.poll() is not None
    assert drain(tmp_path / "spool", f"sqlite:///{database}", 60, tmp_path) == 0


def test_credentials_are_nowhere(tmp_path):
    canary = "s3cr3tCanary"
    spool = tmp_path / "spool"
    tracker = Tracker(spool)
    tracker.start_run("job-1", "job", None, {}, {})
    tracker.close()
    uploader = spawn_uploader(spool, f"http://user:{canary}@127.0.0.1:9/x?token={canary}2", None)
    try:
        deadline = time.monotonic() + 20
        while "trying again" not in uploader.log_path.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        command_lines = " ".join(psutil.Process(uploader.pid).cmdline())
    finally:
        uploader.stop()
    files = [path for path in spool.rglob("*") if path.is_file()]
    assert "trying again" in uploader.log_path.read_text()
    assert canary not in command_lines
    assert [path for path in files if canary.encode() in path.read_bytes()] == []


def test_stop_is_prompt_while_the_target_is_down(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.start_run("job-1", "job", None, {}, {})
    uploader = spawn_uploader(tmp_path, "http://127.0.0.1:9", None)
    assert not uploader.wait_drained(2.0)
    began = time.monotonic()
    uploader.stop()
    assert time.monotonic() - began < 4
    assert uploader.poll() is not None
    assert uploader.pending() == 1


def test_file_stores_are_refused_before_a_process_is_started(tmp_path):
    with pytest.raises(ValueError, match="sqlite:///"):
        spawn_uploader(tmp_path, "file:///tmp/mlruns", None)
    assert os.listdir(tmp_path) == []
