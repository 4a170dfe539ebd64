from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from gangline.monitoring.recording import Tracker
from gangline.monitoring.spool import SpoolWriter
from gangline.monitoring.spool_cursor import Cursor
from gangline.monitoring.tracking_store import (
    MAX_POINTS_PER_REQUEST,
    Point,
    RecordRefusedError,
    RunLostError,
    RunSpec,
    StoreUnavailableError,
)
from gangline.monitoring.uploader import Uploader
from gangline.monitoring.uploader_process import num_pending

URI = "http://store"


class MemoryStore:
    """A store that keeps points in a set per run, and fails as it is told."""

    def __init__(self) -> None:
        self.runs: dict[str, set[Point]] = {}
        self.names: dict[str, str] = {}
        self.sent: Counter[tuple[str, Point]] = Counter()
        self.statuses: dict[str, str] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.params: dict[str, str] = {}
        self.artifacts: list[str] = []
        self.batch_sizes: list[int] = []
        self.artifacts_are_down = False
        self.fail_before: list[Exception] = []
        self.fail_after: list[Exception] = []

    def _before(self) -> None:
        if self.fail_before:
            raise self.fail_before.pop(0)

    def _after(self) -> None:
        if self.fail_after:
            raise self.fail_after.pop(0)

    def open_run(self, spec: RunSpec) -> str:
        self._before()
        run = f"id-{spec.run_id}-{spec.generation}"
        self.runs.setdefault(run, set())
        self.names[run] = spec.name
        self._after()
        return run

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        self._before()
        self.batch_sizes.append(len(points))
        if run not in self.runs:
            raise RunLostError(f"{run} is gone")
        if any(p.value == 666.0 for p in points):
            raise RecordRefusedError("666 is refused")
        self.runs[run] |= set(points)
        self.sent.update((run, p) for p in points)
        self._after()

    def log_params(self, run: str, params: Mapping[str, str]) -> None:
        self._before()
        self.params.update(params)

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        self._before()
        self.tags.setdefault(run, {}).update(tags)

    def log_dataset(self, run: str, dataset: Mapping[str, object]) -> None:
        self._before()

    def log_artifact(self, run: str, path: Path, artifact_dir: str) -> None:
        self._before()
        if self.artifacts_are_down:
            raise StoreUnavailableError("no credentials")
        self.artifacts.append(path.name)

    def set_status(self, run: str, status: str, time_ms: int | None) -> None:
        self._before()
        self.statuses[run] = status

    def remove_duplicates(self, spec: RunSpec, keep: Sequence[str]) -> int:
        return 0


@pytest.fixture
def spool(tmp_path) -> Tracker:
    tracker = Tracker(tmp_path)
    tracker.start_run("r", "n", "e", {"a": {"b": 1}}, {"t": "1"})
    tracker.start_attempt(1)
    return tracker


def uploader(tmp_path: Path, store: MemoryStore, log: list[str] | None = None, **options):
    stop = options.pop("stop", threading.Event())
    lines = [] if log is None else log
    return Uploader(tmp_path, URI, store, stop=stop, log=lines.append, max_backoff_s=0.01)


def values(store: MemoryStore, generation: str = "") -> list[tuple[int, float]]:
    return sorted((p.step, p.value) for p in store.runs[f"id-r-{generation}"])


def log_steps(tracker: Tracker, steps: range, value: float | None = None) -> None:
    for step in steps:
        tracker.log_metrics(
            step, {"train/loss": step / 8 if value is None else value}, generation=1
        )


def expected(steps: range) -> list[tuple[int, float]]:
    return [(s, s / 8) for s in steps]


def test_delivers_everything_in_full_batches(tmp_path, spool):
    store = MemoryStore()
    log_steps(spool, range(1100))
    spool.end_run("SUCCEEDED")
    assert uploader(tmp_path, store).deliver()
    assert values(store) == values(store, "1") == expected(range(1100))
    assert max(store.batch_sizes) <= MAX_POINTS_PER_REQUEST
    assert len(store.batch_sizes) <= 4
    assert store.statuses == {"id-r-": "SUCCEEDED", "id-r-1": "SUCCEEDED"}
    assert store.names == {"id-r-": "r", "id-r-1": "n-attempt-1"}
    assert store.params == {"a.b": "1"}
    assert set(store.sent.values()) == {1}


def test_batches_are_filled_and_not_split(tmp_path, spool):
    store = MemoryStore()
    others = {f"system/n/process/p{i}/rss_bytes": i + 0.5 for i in range(23)}
    for step in range(200):
        spool.log_metrics(step, {"train/loss": 1.0, **others})
    assert uploader(tmp_path, store).deliver()
    assert store.batch_sizes == [984] * 4 + [864]


def test_one_record_with_more_points_than_a_request_takes(tmp_path, spool):
    store = MemoryStore()
    many = {f"system/n/process/p{i}/rss_bytes": i + 0.5 for i in range(2100)}
    spool.log_metrics(0, many)
    assert uploader(tmp_path, store).deliver()
    assert len(store.runs["id-r-"]) == 2100
    assert store.batch_sizes == [1000, 1000, 100]


@pytest.mark.parametrize("when", ["_before", "_after"])
@pytest.mark.parametrize("skip", range(12))
def test_any_request_may_fail_before_or_after_it_was_executed(tmp_path, spool, when, skip):
    store = MemoryStore()
    others = {f"system/n/process/p{i}/rss_bytes": i + 0.5 for i in range(50)}
    for step in range(30):
        spool.log_metrics(step, {"train/loss": step / 8, **others}, generation=1)
    spool.end_run("FAILED")
    cut = [StoreUnavailableError("cut"), StoreUnavailableError("cut again")]
    faults: list[Exception | None] = [*[None] * skip, *cut]

    def fail_in_turn() -> None:
        fault = faults.pop(0) if faults else None
        if fault is not None:
            raise fault

    setattr(store, when, fail_in_turn)
    log: list[str] = []
    assert uploader(tmp_path, store, log).deliver()
    points = store.runs["id-r-"]
    assert len(points) == len({(p.key, p.step) for p in points}) == 30 * 51
    assert points == store.runs["id-r-1"]
    assert store.statuses["id-r-"] == "FAILED"
    assert any("trying again" in line for line in log) == (len(faults) < 2)


def test_stop_ends_the_retries_and_the_next_uploader_goes_on(tmp_path, spool):
    store, stop = MemoryStore(), threading.Event()
    log_steps(spool, range(100))
    store.fail_before = [StoreUnavailableError("down")] * 10_000
    first = uploader(tmp_path, store, stop=stop)
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    began = time.monotonic()
    assert not first.deliver()
    assert time.monotonic() - began < 2.0
    working = MemoryStore()
    assert uploader(tmp_path, working).deliver()
    assert values(working) == expected(range(100))


def test_a_refused_point_is_set_aside_and_the_rest_goes_on(tmp_path, spool):
    store = MemoryStore()
    log_steps(spool, range(500))
    log_steps(spool, range(500, 501), 666.0)
    log_steps(spool, range(501, 900))
    assert uploader(tmp_path, store).deliver()
    assert values(store) == [*expected(range(500)), *expected(range(501, 900))]
    refused = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert [r["record"]["value"] for r in refused] == [666.0, 666.0], "of the job and the attempt"
    assert "666 is refused" in refused[0]["reason"]


def test_a_store_that_lost_its_runs_gets_all_again(tmp_path, spool):
    store = MemoryStore()
    log_steps(spool, range(50))
    one = uploader(tmp_path, store)
    one._stop.wait = lambda _: None
    assert one.deliver()
    store.runs.clear()  # restarted with an empty database
    log_steps(spool, range(50, 60))
    assert one.deliver()
    assert values(store) == values(store, "1") == expected(range(60))


def test_history_deleted_from_the_spool_does_not_stop_a_new_target(tmp_path):
    tracker = Tracker(tmp_path, cap_bytes=20_000, on_event=lambda _: None)
    tracker.start_run("r", "n", "e", {"a": 1}, {})
    tracker.start_attempt(1)
    first, second = MemoryStore(), MemoryStore()
    one = uploader(tmp_path, first)
    for block in range(20):
        log_steps(tracker, range(block * 10, block * 10 + 10))
        assert one.deliver()
    other = Uploader(tmp_path, "http://b", second, stop=threading.Event(), log=print)
    assert other.deliver()
    assert values(first) == expected(range(200))
    assert 0 < len(values(second)) < 200
    assert values(second)[-1] == (199, 199 / 8)
    assert second.params == {"a": "1"}, "the summary of the oldest segment names the run"


def test_dropped_records_become_a_tag_that_is_right_after_a_resend(tmp_path):
    tracker = Tracker(tmp_path, cap_bytes=4_000, on_event=lambda _: None)
    tracker.start_run("r", "n", "e", {}, {})
    log_steps(tracker, range(60))
    tracker.end_run("FAILED")
    store = MemoryStore()
    one = uploader(tmp_path, store)
    for _ in range(2):
        assert one.deliver()
        assert store.tags["id-r-"]["gangline.dropped_records"] == str(tracker.num_dropped)
        one._stop.wait = lambda _: None
        one._rewind(RunLostError("again"))
    assert tracker.num_dropped > 10


def test_artifact_that_is_gone_does_not_stop_the_rest(tmp_path, spool):
    store = MemoryStore()
    (tmp_path / "here.txt").write_text("x")
    spool.log_artifact(tmp_path / "gone.txt")
    spool.log_artifact(tmp_path / "here.txt")
    log: list[str] = []
    assert uploader(tmp_path, store, log).deliver()
    assert store.artifacts == ["here.txt"]
    assert any("gone.txt does not exist" in line for line in log)


def test_artifact_store_that_is_down_does_not_hold_up_the_metrics(tmp_path, spool):
    store = MemoryStore()
    store.artifacts_are_down = True
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
        spool.log_artifact(tmp_path / name)
    spool.log_artifact(tmp_path / "a.txt")
    log_steps(spool, range(10))
    assert not uploader(tmp_path, store).deliver()
    assert values(store) == expected(range(10))
    # They are not forgotten with the process, and count as pending.
    assert len(Cursor.load(tmp_path, URI).postponed) == 2
    assert num_pending(tmp_path, URI) == 2
    second = uploader(tmp_path, store)
    assert not second.deliver()
    store.artifacts_are_down = False
    deadline = time.monotonic() + 20
    while not second.deliver() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sorted(store.artifacts) == ["a.txt", "b.txt"]
    assert num_pending(tmp_path, URI) == 0


def test_points_without_a_run_are_set_aside(tmp_path):
    writer = SpoolWriter(tmp_path)
    point = {"type": "metrics", "generation": 1, "step": 0, "time_ms": 1, "parent": True}
    writer.append([{**point, "values": {"train/loss": 1.0}}, {"type": "of a later version"}])
    assert uploader(tmp_path, MemoryStore()).deliver()
    refused = (tmp_path / "refused.jsonl").read_text()
    assert "before any start of a run" in refused
    assert "knows no such record" in refused


def test_a_long_outage_is_told_in_few_lines(tmp_path, spool):
    store = MemoryStore()
    log: list[str] = []
    log_steps(spool, range(3))
    store.fail_before = [StoreUnavailableError("down")] * 200
    assert uploader(tmp_path, store, log).deliver()
    assert 3 < len([line for line in log if "trying again" in line]) < 12
