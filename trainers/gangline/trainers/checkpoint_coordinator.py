"""What rank 0 alone does for a checkpoint: hold the lock, decide, commit, remove what is old."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gangline.trainers.checkpoint_storage import SafetensorsWriter
from gangline.trainers.commit import (
    CheckpointError,
    CommitFence,
    FileRecord,
    lock_writer,
)
from gangline.trainers.commit_retention import Retention, clean


@dataclass(frozen=True)
class CheckpointEvent:
    """Say what became of one save, on every rank."""

    status: Literal["committed", "kept", "failed"]  # kept: the step was there already, verified
    step: int
    generation: int
    reason: str  # of "failed" and "kept"; else a note, or empty
    num_bytes: int  # of the whole checkpoint
    parts_s: dict[str, float]  # see Checkpointer.save
    path: Path | None = None  # of the committed step
    is_fenced: bool = False  # a newer generation runs: this process should end
    time: float = field(default_factory=time.time)  # unix_s


@dataclass
class Job:
    """Carry one save from the training to the thread."""

    step: int
    attempt: str
    extra: dict[str, Any]
    parts_s: dict[str, float]


class Coordinator:
    """Commit the steps of one generation.

    Raises: StaleGenerationError where a newer generation has been admitted; WriterLockedError
    where another process writes checkpoints here.
    """

    def __init__(
        self, root: Path, writer: SafetensorsWriter, *, generation: int, keep: int
    ) -> None:
        self._root = root
        self._writer = writer
        self._generation = generation
        self._fence = CommitFence(root)
        self._retention = Retention(root, keep=keep)
        self._fence.advance(generation)
        self._lock = lock_writer(root)

    def clean(self) -> None:
        """Remove what dead generations left behind, as far as possible."""
        with suppress(OSError):
            clean(self._root, generation=self._generation)

    def commit(self, job: Job, reports: list[dict[str, Any]]) -> dict[str, Any]:
        """Judge the reports of all ranks, and commit or drop the step.

        Returns: "status" and "reason" of the event, and whether this generation is fenced.
        """
        started_s = time.monotonic()
        try:
            if any(r["attempt"] != job.attempt or r["step"] != job.step for r in reports):
                steps = [report["step"] for report in reports]
                raise CheckpointError(f"the ranks are not at the same save: steps {steps}")
            errors = [report["error"] for report in reports if "error" in report]
            if errors:
                raise CheckpointError("; ".join(errors))
            records = {n: FileRecord(*v) for r in reports for n, v in r["files"].items()}
            done = self._writer.commit(records)
            self._retention.remember(done.path)
            return {"status": "kept" if done.kept else "committed", "reason": done.note}
        except (CheckpointError, OSError) as error:
            self._writer.abandon()
            return {"status": "failed", "reason": str(error), "is_fenced": self._is_fenced()}
        finally:
            job.parts_s["commit"] = time.monotonic() - started_s

    def prune(self, job: Job) -> str:
        """Remove old checkpoints; return a remark where that failed, which costs only space."""
        started_s = time.monotonic()
        try:
            self._retention.prune(generation=self._generation, fence=self._fence)
        except (CheckpointError, OSError) as error:
            return f" older checkpoints could not be removed: {error}"
        finally:
            job.parts_s["prune"] = time.monotonic() - started_s
        return ""

    def _is_fenced(self) -> bool:
        # A folder that cannot be read is why the save failed, and no reason to end the training.
        with suppress(OSError):
            return self._fence.generation > self._generation
        return False

    def close(self) -> None:
        """Let another process write here."""
        self._lock.release()
