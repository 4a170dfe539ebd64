"""The append side of tracking: what the controller records, in the spool, and nothing else.

In MLflow a job is one run, named by its run id, with the whole curve: of the values that belong to
a step the first one stays, so that steps computed again after a restart do not appear twice. Each
attempt (generation) is a child run with what that attempt measured. Which values go to the job's
run is decided here, once, and stands in the record.

Imports no MLflow: a controller that tracks costs a few megabytes, not two hundred.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from gangline.monitoring.metrics import is_once_per_step, metric
from gangline.monitoring.mlflow_limits import flatten
from gangline.monitoring.spool import DEFAULT_CAP_BYTES, SpoolWriter
from gangline.monitoring.spool_reader import OnEvent, Record, SpoolReader, newest_summary, warn
from gangline.monitoring.step_set import StepSet

STATUSES = ("SUCCEEDED", "FAILED", "CANCELLED")
RUN_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Tracker:
    """Record the runs, metrics and artifacts of one job in a spool folder.

    Opening a folder that has records goes on where they end, whoever wrote them. All methods may be
    called from several threads. A record is durable on return; if the disk is full or sick it is
    kept in memory or dropped, with an event, and nothing is raised.

    Raises: UnknownMetricError for a metric that is not in the table; SpoolLockedError if another
    process has the folder open.
    """

    def __init__(
        self,
        spool_dir: Path,
        *,
        cap_bytes: int = DEFAULT_CAP_BYTES,
        on_event: OnEvent = warn,
    ) -> None:
        self._seen: dict[str, StepSet] = {}
        self._run: Record | None = None
        self._open_attempts: set[int] = set()
        self._lock = threading.Lock()
        self._writer = SpoolWriter(
            spool_dir, cap_bytes=cap_bytes, summarise=self._state, on_event=on_event
        )
        reader = SpoolReader(spool_dir, on_event=on_event)
        for record in reader.records(newest_summary(spool_dir)):
            self._restore(record)

    @property
    def num_dropped(self) -> int:
        """Return how many records were dropped since this object was made."""
        return self._writer.num_dropped

    def start_run(
        self,
        run_id: str,
        name: str,
        experiment: str | None,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        dataset: Mapping[str, object] | None = None,
        *,
        time_s: float | None = None,
    ) -> None:
        """Begin the job, or go on with it: the same `run_id` finds the same run.

        `params` may be nested; `dataset` has `path`, `digest` and whatever describes the data.

        Raises: ValueError for a run id with other characters than `a-z 0-9 . _ -`.
        """
        if not RUN_ID.fullmatch(run_id):
            raise ValueError(f"run id {run_id!r} does not match {RUN_ID.pattern}")
        record = {
            "type": "run",
            "run_id": run_id,
            "name": name,
            "experiment": experiment or "gangline",
            "params": flatten(params),
            "tags": flatten(tags),
            "dataset": None if dataset is None else dict(dataset),
            "time_ms": _milliseconds(time_s),
        }
        with self._lock:
            self._run = record
            self._writer.append([record], essential=True)

    def start_attempt(
        self, generation: int, tags: Mapping[str, str] | None = None, *, time_s: float | None = None
    ) -> None:
        """Begin a generation; one that was left open before it has failed."""
        time_ms = _milliseconds(time_s)
        with self._lock:
            self._require_run("start_attempt")
            ends = self._ends_of(self._open_attempts - {generation}, "FAILED", time_ms)
            start = {"type": "attempt", "generation": generation, "tags": dict(tags or {})}
            self._writer.append([*ends, {**start, "time_ms": time_ms}], essential=True)
            self._open_attempts = {generation}

    def log_metrics(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        time_s: float | None = None,
        generation: int | None = None,
    ) -> bool:
        """Record values of one step; return True once they are durable.

        With a `generation` they go to the run of that attempt, and to the run of the job unless it
        has that metric of that step already; without one only to the run of the job.
        """
        numbers = {name: _number(name, value) for name, value in values.items()}
        once = [name for name in numbers if metric(name).once_per_step]
        with self._lock:
            self._require_run("log_metrics")
            again = {name for name in once if step in self._seen.get(name, ())}
            new = [name for name in numbers if name not in again]
            if generation is None:
                numbers = {name: numbers[name] for name in new}
            if not numbers:
                return True
            record = {
                "type": "metrics",
                "generation": generation,
                "step": step,
                "time_ms": _milliseconds(time_s),
                "values": {n: v if math.isfinite(v) else str(v) for n, v in numbers.items()},
                "parent": new if again and generation is not None else True,
            }
            dropped_before = self._writer.num_dropped
            durable = self._writer.append([record])
            if self._writer.num_dropped == dropped_before:
                self._restore(record)
            return durable

    def log_artifact(self, path: Path, artifact_dir: str = "") -> None:
        """Record that a file or folder is to be uploaded as it is then, replacing an older one."""
        record = {"type": "artifact", "path": str(path.resolve()), "artifact_dir": artifact_dir}
        with self._lock:
            self._require_run("log_artifact")
            self._writer.append([record], essential=True)

    def end_attempt(self, generation: int, status: str, *, time_s: float | None = None) -> None:
        """End a generation with SUCCEEDED, FAILED or CANCELLED."""
        self._end({generation}, _status(status), _milliseconds(time_s), [])

    def end_run(self, status: str, *, time_s: float | None = None) -> None:
        """End the job, and what is open of it, with SUCCEEDED, FAILED or CANCELLED."""
        time_ms = _milliseconds(time_s)
        last = {"type": "run_end", "status": _status(status), "time_ms": time_ms}
        self._end(set(self._open_attempts), status, time_ms, [last])

    def close(self) -> None:
        """Release the folder; the uploader may go on reading it."""
        self._writer.close()

    def _end(self, attempts: set[int], status: str, time_ms: int, then: list[Record]) -> None:
        with self._lock:
            self._require_run("end_attempt and end_run")
            self._writer.append([*self._ends_of(attempts, status, time_ms), *then], essential=True)
            self._open_attempts -= attempts

    def _ends_of(self, attempts: set[int], status: str, time_ms: int) -> list[Record]:
        end = {"type": "attempt_end", "status": status, "time_ms": time_ms}
        return [{**end, "generation": generation} for generation in sorted(attempts)]

    def _require_run(self, method: str) -> None:
        if self._run is None:
            raise RuntimeError(f"{method} before start_run: the spool does not know its run yet")

    def _state(self) -> Record:
        """Return the summary that stands at the head of each segment of the spool."""
        seen = {name: steps.state() for name, steps in self._seen.items()}
        return {"run": self._run, "open_attempts": sorted(self._open_attempts), "seen": seen}

    def _restore(self, record: Record) -> None:
        """Take one record of the spool into the state of this object."""
        kind = record.get("type")
        if kind == "state":
            self._run = record["run"]
            self._open_attempts = set(record["open_attempts"])
            self._seen = {name: StepSet(state) for name, state in record["seen"].items()}
        elif kind == "run":
            self._run = record
        elif kind == "attempt":
            self._open_attempts.add(record["generation"])
        elif kind == "attempt_end":
            self._open_attempts.discard(record["generation"])
        elif kind == "metrics":
            for name in record["values"]:
                if is_once_per_step(name):
                    self._seen.setdefault(name, StepSet()).add(record["step"])


def _milliseconds(time_s: float | None) -> int:
    return round((time.time() if time_s is None else time_s) * 1000)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"metric {name!r} has the value {value!r}; wanted a number")
    return float(value)


def _status(status: str) -> str:
    if status not in STATUSES:
        raise ValueError(f"status {status!r} is unknown; wanted one of {', '.join(STATUSES)}")
    return status
