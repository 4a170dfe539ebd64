"""Disks that fill up: every budget of free space, from nothing to more than enough.

On a tmpfs of a few MiB, a ballast file leaves just so much room, in steps, and a save is tried;
then the ballast goes and another one is tried. Ours runs twice: as it is, refusing before the
first byte, and with that check off, so that the disk fills in the middle of the files.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from gangline.orchestrator.bench_checkpoint_kill import Tally, classify
from gangline.orchestrator.bench_checkpoint_mounts import in_private_mounts, mounted_tmpfs
from gangline.orchestrator.bench_checkpoint_subjects import (
    DEFAULT_ELEMENTS,
    NUM_TENSORS,
    SaveFailedError,
    Subject,
    fresh,
)

_DISK_BYTES = 8 << 20
_NEED_BYTES = 4 * NUM_TENSORS * DEFAULT_ELEMENTS


def run_budgets(subject: Subject, work: Path, *, step_bytes: int) -> Tally:
    """Try a save with each budget of free space, `step_bytes` apart."""
    told = in_private_mounts(lambda: _run(subject, work, step_bytes))
    tally = Tally()
    for name, value in told.items():
        setattr(tally, name, value)
    return tally


def _run(subject: Subject, work: Path, step_bytes: int) -> dict[str, Any]:
    tally = Tally()
    started_s = time.monotonic()
    tally.more["saves_refused"] = 0
    for budget in range(0, int(1.5 * _NEED_BYTES) + step_bytes, step_bytes):
        with mounted_tmpfs(work / "full", size_bytes=_DISK_BYTES):
            _try_budget(subject, fresh(work / "full" / "run"), budget, tally)
    shutil.rmtree(work / "full")
    tally.seconds = time.monotonic() - started_s
    return vars(tally)


def _try_budget(subject: Subject, root: Path, budget: int, tally: Tally) -> None:
    session = subject.start(root, 1)
    session.save(1)
    ballast = _fill(root.parent, budget)
    refused = ""
    try:
        session.save(2)
    except (SaveFailedError, OSError) as error:
        refused = str(error) or type(error).__name__
    acknowledged = 1 if refused else 2
    tally.num_faults += 1
    tally.num_acknowledged += acknowledged
    tally.more["saves_refused"] += bool(refused)
    outcome, why = classify(subject, root, acknowledged)
    ballast.unlink()
    if outcome == "ok":
        try:
            session.save(3)
            outcome, why = classify(subject, root, 3)
        except (SaveFailedError, OSError) as error:
            outcome, why = "stuck", f"with room again: {error}"
    session.close()
    tally.add(outcome, f"{budget} bytes free: {why} (the save: {refused or 'acknowledged'})")


def _fill(folder: Path, budget: int) -> Path:
    ballast = folder / "ballast"
    status = os.statvfs(folder)
    size = max(0, status.f_bavail * status.f_frsize - budget)
    with open(ballast, "wb") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
    return ballast
