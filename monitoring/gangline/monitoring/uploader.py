"""Deliver a spool to a tracking store, each point exactly once.

The spool fixes key, step, time and value of a point before the first attempt to send it, and the
store refuses a second row with the same five (run, key, step, time, value). So an uploader may
send a batch again whenever it does not know whether the last attempt was executed: after a
time-out, a dropped answer, its own death before the cursor was saved. Runs are found by their
tags before one is created, and tags, settings and artifacts overwrite themselves.

This file knows no MLflow; `gangline.monitoring.tracker` implements `TrackingStore` with it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
)
from tenacity.stop import stop_when_event_set
from tenacity.wait import wait_random_exponential

from gangline.monitoring.spool_cursor import Cursor, Position
from gangline.monitoring.spool_reader import Record, SpoolReader
from gangline.monitoring.tracking_store import (
    MAX_POINTS_PER_REQUEST,
    Point,
    RecordRefusedError,
    RunLostError,
    RunSpec,
    StoreError,
    StoreUnavailableError,
    TrackingStore,
)

# Beyond that refused records are only named in the log.
MAX_REFUSED_BYTES = 16 * 2**20
# Artifacts may live in another store than the metrics: one that fails must not hold those up.
ARTIFACT_ATTEMPTS = 3
MAX_ARTIFACT_WAIT_S = 60.0
PARENT = ""

T = TypeVar("T")


class Uploader:
    """Read a spool behind its cursor and deliver what stands there."""

    def __init__(
        self,
        spool_dir: Path,
        uri: str,
        store: TrackingStore,
        *,
        stop: threading.Event,
        log: Callable[[str], None],
        max_backoff_s: float = 10.0,
    ) -> None:
        self.cursor = Cursor.load(spool_dir, uri)
        self._uri = uri
        self._store = store
        self._stop = stop
        self._log = log
        self._reader = SpoolReader(spool_dir, on_event=log)
        self._refused_path = spool_dir / "refused.jsonl"
        self._num_rewinds = 0
        self._artifact_wait_s = 0.0
        self._next_artifact_try = 0.0
        self._retrying = Retrying(
            retry=retry_if_exception_type(StoreUnavailableError),
            wait=wait_random_exponential(multiplier=0.5, max=max_backoff_s),
            stop=stop_when_event_set(stop),
            sleep=sleep_using_event(stop),
            before_sleep=self._log_retry,
            reraise=True,
        )
        self._retrying_artifact = self._retrying.copy(
            stop=stop_when_event_set(stop) | stop_after_attempt(ARTIFACT_ATTEMPTS)
        )

    def deliver(self) -> bool:
        """Deliver what the spool holds now; return True if nothing is left.

        Tries for ever while the store is unavailable; a set `stop` event ends it after the current
        request, with what is delivered so far recorded.
        """
        while not self._stop.is_set():
            entries = self._reader.read(self.cursor.position)
            try:
                if not entries:
                    return self._deliver_postponed()
                self._deliver_entries([(entry.record, entry.after) for entry in entries])
            except StoreUnavailableError:
                assert self._stop.is_set(), "only a stop ends the retries"
            except RunLostError as error:
                self._rewind(error)
        return False

    def _deliver_entries(self, entries: Sequence[tuple[Record, Position]]) -> None:
        points: dict[str, list[Point]] = {}
        reached = self.cursor.position
        for record, after in entries:
            if record.get("type") == "metrics":
                most = max(map(len, points.values()), default=0)
                if most + len(record["values"]) > MAX_POINTS_PER_REQUEST:
                    self._send_points(points, reached)
                _collect(record, points)
            else:
                self._send_points(points, reached)
                self._handle(record)
                self._commit(after)
            reached = after
        self._send_points(points, reached)

    def _send_points(self, points: dict[str, list[Point]], reached: Position) -> None:
        for generation, batch in points.items():
            try:
                run = self._run(generation)
            except RecordRefusedError as error:
                self._refuse({"type": "points", "generation": generation}, error)
                continue
            for start in range(0, len(batch), MAX_POINTS_PER_REQUEST):
                self._log_points(run, batch[start : start + MAX_POINTS_PER_REQUEST])
        points.clear()
        self._commit(reached)

    def _log_points(self, run: str, batch: list[Point]) -> None:
        try:
            self._call(lambda: self._store.log_points(run, batch))
        except RecordRefusedError as error:
            # Halve until the offender is alone: the rest of the batch is good.
            if len(batch) == 1:
                self._refuse({"type": "point", **batch[0]._asdict()}, error)
                return
            middle = len(batch) // 2
            self._log_points(run, batch[:middle])
            self._log_points(run, batch[middle:])

    def _handle(self, record: Record) -> None:
        handlers = {
            "run": self._handle_run,
            "state": self._handle_state,
            "attempt": self._handle_attempt,
            "attempt_end": self._handle_attempt_end,
            "run_end": self._handle_run_end,
            "artifact": self._handle_artifact,
            "gap": self._handle_gap,
        }
        handler = handlers.get(str(record.get("type")))
        try:
            if handler is None:
                raise RecordRefusedError("this version knows no such record")
            handler(record)
        except RecordRefusedError as error:
            self._refuse(record, error)

    def _handle_run(self, record: Record) -> None:
        self.cursor.job = {key: record[key] for key in ("run_id", "name", "experiment", "time_ms")}
        run = self._run(PARENT)
        for send in (
            lambda: self._store.log_params(run, record["params"]),
            lambda: self._store.set_tags(run, record["tags"]),
            lambda: self._store.set_status(run, "RUNNING", None),
            lambda: self._store.log_dataset(run, record["dataset"] or {}),
        ):
            try:
                self._call(send)
            except RecordRefusedError as error:
                self._refuse({**record, "params": "see job.yaml"}, error)

    def _handle_state(self, record: Record) -> None:
        # Of use only where the segments before it have been deleted.
        if not self.cursor.job and record.get("run"):
            self._handle_run(record["run"])

    def _handle_attempt(self, record: Record) -> None:
        run = self._run(str(record["generation"]), record["time_ms"])
        self._call(lambda: self._store.set_tags(run, record["tags"]))
        self._call(lambda: self._store.set_status(run, "RUNNING", None))

    def _handle_attempt_end(self, record: Record) -> None:
        run = self._run(str(record["generation"]))
        self._call(lambda: self._store.set_status(run, record["status"], record["time_ms"]))

    def _handle_run_end(self, record: Record) -> None:
        run = self._run(PARENT)
        keep = list(self.cursor.runs.values())
        spec = self._spec(PARENT, record["time_ms"])
        num_removed = self._call(lambda: self._store.remove_duplicates(spec, keep))
        if num_removed:
            self._log(f"removed {num_removed} empty runs that a late answer had left behind")
        self._call(lambda: self._store.set_status(run, record["status"], record["time_ms"]))

    def _handle_artifact(self, record: Record) -> None:
        try:
            self._upload(record)
        except StoreUnavailableError as error:
            if self._stop.is_set():
                raise
            self._log(f"artifact {record['path']} postponed: {error}")
            if record not in self.cursor.postponed:
                self.cursor.postponed.append(record)

    def _deliver_postponed(self) -> bool:
        """Try the postponed artifacts again, ever more rarely; return True if none is left."""
        if not self.cursor.postponed or time.monotonic() < self._next_artifact_try:
            return not self.cursor.postponed
        waiting, self.cursor.postponed = self.cursor.postponed, []
        for record in waiting:
            self._handle(record)
        done = not self.cursor.postponed
        self._artifact_wait_s = (
            0.0 if done else min(2 * self._artifact_wait_s + 1, MAX_ARTIFACT_WAIT_S)
        )
        self._next_artifact_try = time.monotonic() + self._artifact_wait_s
        self.cursor.save(self._uri)
        return done

    def _upload(self, record: Record) -> None:
        path = Path(record["path"])
        if not path.exists():
            raise RecordRefusedError(f"{path} does not exist any more")
        run = self._run(PARENT)
        self._retrying_artifact(lambda: self._store.log_artifact(run, path, record["artifact_dir"]))

    def _handle_gap(self, record: Record) -> None:
        total = self.cursor.num_dropped + int(record["num_records"])
        run = self._run(PARENT)
        self._call(lambda: self._store.set_tags(run, {"gangline.dropped_records": str(total)}))
        self.cursor.num_dropped = total

    def _run(self, generation: str, time_ms: int | None = None) -> str:
        """Return the store's id of a run, opening it on first use."""
        run = self.cursor.runs.get(generation)
        if run is None:
            spec = self._spec(generation, time_ms)
            run = self._call(lambda: self._store.open_run(spec))
            self.cursor.runs[generation] = run
            self.cursor.save(self._uri)
        return run

    def _spec(self, generation: str, time_ms: int | None) -> RunSpec:
        job = self.cursor.job
        if not job:
            raise RecordRefusedError("it stands before any start of a run")
        return RunSpec(
            run_id=str(job["run_id"]),
            generation=generation,
            name=f"{job['name']}-attempt-{generation}" if generation else str(job["run_id"]),
            experiment=str(job["experiment"]),
            parent=self._run(PARENT) if generation else None,
            time_ms=int(time_ms or job["time_ms"]),
        )

    def _call(self, send: Callable[[], T]) -> T:
        return self._retrying(send)

    def _commit(self, position: Position) -> None:
        if position != self.cursor.position:
            self.cursor.position = position
            self.cursor.save(self._uri)

    def _rewind(self, error: RunLostError) -> None:
        """Send all that the spool still holds again, to runs that will be found or made anew."""
        self._log(f"the store has lost a run ({error}); sending the whole spool again")
        self.cursor.runs.clear()
        self.cursor.num_dropped = 0
        self._commit(Position())
        # A store that forgets again and again must not be flooded.
        self._stop.wait(min(0.5 * 2.0**self._num_rewinds, 60.0))
        self._num_rewinds += 1

    def _refuse(self, record: Record, error: StoreError) -> None:
        self._log(f"set aside a {record.get('type')} record: {error}")
        size_bytes = self._refused_path.stat().st_size if self._refused_path.exists() else 0
        if size_bytes < MAX_REFUSED_BYTES:
            line = {"time": time.time(), "reason": str(error), "record": record}
            with self._refused_path.open("a") as file:
                file.write(json.dumps(line, default=str) + "\n")

    def _log_retry(self, state: RetryCallState) -> None:
        # The first failure, then each doubling: a long outage is told in a handful of lines.
        if state.attempt_number & (state.attempt_number - 1) == 0 and state.outcome is not None:
            error = state.outcome.exception()
            self._log(f"attempt {state.attempt_number} failed, trying again: {error}")


def _collect(record: Record, points: dict[str, list[Point]]) -> None:
    """Add the points of a metrics record to the batches of the runs that they belong to."""
    values = {key: float(value) for key, value in record["values"].items()}
    for_parent = record["parent"]
    generation = record["generation"]
    for key, value in values.items():
        point = Point(key, value, record["time_ms"], record["step"])
        if for_parent is True or (for_parent and key in for_parent):
            points.setdefault(PARENT, []).append(point)
        if generation is not None:
            points.setdefault(str(generation), []).append(point)
