from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.monitoring.metrics import UnknownMetricError
from gangline.monitoring.recording import Tracker
from gangline.monitoring.spool_reader import Record, SpoolReader, segment_numbers


def records(spool: Path, kind: str) -> list[Record]:
    return [r for r in SpoolReader(spool).records() if r["type"] == kind]


def started(spool: Path, **options) -> Tracker:
    tracker = Tracker(spool, **options)
    tracker.start_run("run-a1", "run", None, {"model": {"dim": 8}}, {"gangline.version": "1"})
    return tracker


def curve(spool: Path, name: str) -> list[tuple[int, float]]:
    """Return what the run of the job gets, as the uploader reads it."""
    return [
        (r["step"], float(r["values"][name]))
        for r in records(spool, "metrics")
        if name in r["values"] and (r["parent"] is True or name in r["parent"])
    ]


def test_controller_side_imports_nothing_heavy():
    script = (
        "import sys; from gangline.monitoring.tracker import Tracker, spawn_uploader; "
        "heavy = {'mlflow', 'torch', 'numpy', 'pandas', 'ray', 'tenacity'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_first_value_of_a_step_stays_in_the_job_and_each_attempt_has_its_own(tmp_path):
    tracker = started(tmp_path)
    tracker.start_attempt(1)
    for step in range(6):
        tracker.log_metrics(step, {"train/loss": step + 0.1}, generation=1)
    tracker.start_attempt(2)
    for step in range(3, 9):
        tracker.log_metrics(step, {"train/loss": step + 0.2, "job/lost_steps": 3}, generation=2)
    assert curve(tmp_path, "train/loss") == [(s, s + (0.1 if s < 6 else 0.2)) for s in range(9)]
    second = [r for r in records(tmp_path, "metrics") if r["generation"] == 2]
    assert [r["step"] for r in second] == list(range(3, 9))
    assert len(curve(tmp_path, "job/lost_steps")) == 6, "an event may come again at a step"


def test_without_generation_only_the_job_gets_it_and_a_repeat_is_no_record(tmp_path):
    tracker = started(tmp_path)
    assert tracker.log_metrics(5, {"eval/loss": 1.0})
    assert tracker.log_metrics(5, {"eval/loss": 2.0})
    assert curve(tmp_path, "eval/loss") == [(5, 1.0)]
    assert len(records(tmp_path, "metrics")) == 1


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 12), st.sets(st.sampled_from(["train/loss", "train/lr"]), min_size=1)
        ),
        max_size=40,
    ),
    st.sets(st.integers(0, 39)),
)
def test_first_value_wins_across_any_number_of_reopenings(tmp_path_factory, logged, reopen_at):
    spool = tmp_path_factory.mktemp("spool")
    tracker = started(spool, cap_bytes=40_000)
    truth: dict[tuple[str, int], float] = {}
    for index, (step, names) in enumerate(logged):
        if index in reopen_at:
            tracker.close()
            tracker = Tracker(spool)
        tracker.log_metrics(step, {name: float(index) for name in names}, generation=1)
        for name in names:
            truth.setdefault((name, step), float(index))
    tracker.close()
    for name in ("train/loss", "train/lr"):
        steps = curve(spool, name)
        assert len(steps) == len({step for step, _ in steps})
        assert dict(steps) == {s: v for (n, s), v in truth.items() if n == name}


def test_state_survives_the_deletion_of_delivered_segments(tmp_path):
    from gangline.monitoring.spool_cursor import Cursor, Position

    tracker = started(tmp_path, cap_bytes=20_000)
    cursor = Cursor.load(tmp_path, "http://h")
    tracker.start_attempt(1)
    for step in range(300):
        assert tracker.log_metrics(step, {"train/loss": 1.0, "train/lr": 2.0}, generation=1)
        cursor.position = Position(segment_numbers(tmp_path)[-1], 0, 0)
        cursor.save("http://h")
    tracker.close()
    assert segment_numbers(tmp_path)[0] > 2, "old segments are gone"
    again = Tracker(tmp_path)
    again.log_metrics(0, {"train/loss": 9.0}, generation=1)
    again.log_metrics(300, {"train/loss": 9.0}, generation=1)
    last = records(tmp_path, "metrics")[-2:]
    assert [r["parent"] for r in last] == [[], True]
    again.end_run("FAILED")
    assert [r["generation"] for r in records(tmp_path, "attempt_end")] == [1]


def test_attempt_left_open_has_failed_when_the_next_begins(tmp_path):
    tracker = started(tmp_path)
    tracker.start_attempt(1, time_s=10.0)
    tracker.close()  # the controller died without a word
    tracker = started(tmp_path)
    tracker.start_attempt(2, {"reason": "resumed"}, time_s=20.0)
    tracker.end_run("SUCCEEDED", time_s=30.0)
    ends = records(tmp_path, "attempt_end")
    assert [(r["generation"], r["status"], r["time_ms"]) for r in ends] == [
        (1, "FAILED", 20_000),
        (2, "SUCCEEDED", 30_000),
    ]
    assert [r["status"] for r in records(tmp_path, "run_end")] == ["SUCCEEDED"]


def test_numbers_of_any_kind_go_through_unchanged(tmp_path):
    tracker = started(tmp_path)
    values: list[float] = [
        0.1,
        1e-323,
        -1.7976931348623157e308,
        math.inf,
        -math.inf,
        float(np.float32(0.1)),
        3,
    ]
    for step, value in enumerate(values):
        tracker.log_metrics(step, {"train/loss": value}, time_s=step + 0.0004)
    assert [v for _, v in curve(tmp_path, "train/loss")] == [float(v) for v in values]
    tracker.log_metrics(99, {"train/loss": math.nan})
    assert math.isnan(curve(tmp_path, "train/loss")[-1][1])
    assert "NaN" not in next(tmp_path.glob("segment*")).read_text(), "every line is strict JSON"


def test_passwords_of_uris_are_not_recorded(tmp_path):
    tracker = Tracker(tmp_path)
    params = {"tracking": {"uri": "http://user:s3cr3t@host/x"}, "data": ["s3://key:s3cr3t@b/c"]}
    tracker.start_run("r", "r", None, params, {"origin": "https://s3cr3t@git.example/r.git"})
    text = next(tmp_path.glob("segment*")).read_text()
    assert "s3cr3t" not in text
    assert "http://***@host/x" in text


@pytest.mark.parametrize("value", ["1.0", True, None, [1.0]])
def test_what_is_no_number_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match=r"'train/loss'.*wanted a number"):
        started(tmp_path).log_metrics(0, {"train/loss": value})


def test_misuse_is_an_error_with_the_mend_and_leaves_no_record(tmp_path):
    tracker = Tracker(tmp_path)
    with pytest.raises(RuntimeError, match="before start_run"):
        tracker.log_metrics(0, {"train/loss": 1.0})
    with pytest.raises(ValueError, match=r"run id '\.\./x'"):
        tracker.start_run("../x", "x", None, {}, {})
    tracker.close()
    tracker = started(tmp_path)
    with pytest.raises(UnknownMetricError, match="did you mean"):
        tracker.log_metrics(0, {"train/loss": 1.0, "train/los": 1.0})
    with pytest.raises(ValueError, match="wanted one of SUCCEEDED, FAILED, CANCELLED"):
        tracker.end_run("DONE")
    assert records(tmp_path, "metrics") == records(tmp_path, "run_end") == []


def test_a_dropped_value_is_not_remembered_as_logged(tmp_path):
    tracker = started(tmp_path, cap_bytes=4_000, on_event=lambda _: None)
    step = 0
    while tracker.log_metrics(step, {"train/loss": 1.0}, generation=1):
        step += 1
    tracker.close()
    tracker = Tracker(tmp_path, on_event=lambda _: None)  # a larger cap
    assert tracker.log_metrics(step, {"train/loss": 2.0}, generation=2)
    assert curve(tmp_path, "train/loss")[-1] == (step, 2.0)
    assert tracker.num_dropped == 0


def test_threads_may_log_at_once(tmp_path):
    tracker = started(tmp_path)

    def log(first: int) -> None:
        for step in range(first, 400, 4):
            tracker.log_metrics(step, {"train/loss": float(step)}, generation=1)

    threads = [threading.Thread(target=log, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(curve(tmp_path, "train/loss")) == [(s, float(s)) for s in range(400)]
