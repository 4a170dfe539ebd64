"""What an uploader needs of a tracking store, and how a store may answer.

Errors
  StoreError
    StoreUnavailableError   down, hung, overloaded, not authorised: try again, for ever
    RecordRefusedError      the store will never take this: set aside, go on
    RunLostError            the store forgot the run (new database, deleted): send all again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

MAX_POINTS_PER_REQUEST = 1000


class StoreError(RuntimeError):
    """Say what a tracking store answered."""


class StoreUnavailableError(StoreError):
    """Say that the store did not take a request now; the request may have been executed."""


class RecordRefusedError(StoreError):
    """Say that the store will not take a record at any time."""


class RunLostError(StoreError):
    """Say that a run that existed is gone from the store."""


class Point(NamedTuple):
    """One value of a metric; NaN and infinities are values."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class RunSpec:
    """What identifies a run in the store: the job's own run, or one attempt (generation) of it."""

    run_id: str
    generation: str  # "" for the run of the job
    name: str
    experiment: str
    parent: str | None
    time_ms: int


class TrackingStore(Protocol):
    """What an uploader needs of a store. Every method may raise a `StoreError`."""

    def open_run(self, spec: RunSpec) -> str:
        """Return the store's id of the run, creating it if it does not exist."""

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Add at most `MAX_POINTS_PER_REQUEST` points; points that exist stay single."""

    def log_params(self, run: str, params: Mapping[str, str]) -> None:
        """Record settings; the first value of each stays, a later one goes to a tag."""

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Record tags; the last value of each stays."""

    def log_dataset(self, run: str, dataset: Mapping[str, object]) -> None:
        """Record the training data by name and digest; nothing if there is none."""

    def log_artifact(self, run: str, path: Path, artifact_dir: str) -> None:
        """Upload a file or folder, replacing what has its name."""

    def set_status(self, run: str, status: str, time_ms: int | None) -> None:
        """Set RUNNING (no time), SUCCEEDED, FAILED or CANCELLED with the time of the end."""

    def remove_duplicates(self, spec: RunSpec, keep: Sequence[str]) -> int:
        """Delete empty runs of the job that are not in `keep`; return how many there were."""
