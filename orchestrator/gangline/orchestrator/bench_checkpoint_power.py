"""Power cuts: what is in the page cache alone is lost.

A child saves onto ext4 in an image file. At the cut it is stopped, and the image is copied as the
kernel has written it so far; the child is killed, the copy mounted (which replays its journal),
and the checkpoints in it are judged by the steps acknowledged before the copy. A copy during which
the kernel wrote to the device is no state that ever was, and is made again.

What this cannot show: a disk that loses its own write cache although it was told to flush it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from gangline.orchestrator.bench_checkpoint_kill import Tally, classify
from gangline.orchestrator.bench_checkpoint_mounts import in_private_mounts, make_image, mounted
from gangline.orchestrator.bench_checkpoint_puppet import Puppet
from gangline.orchestrator.bench_checkpoint_subjects import Subject, fresh

_IMAGE_BYTES = 64 << 20
_MAX_COPIES = 50


def run_power_cuts(
    subject: Subject, work: Path, *, seed: int, num_cuts: int, first: int = 0
) -> Tally:
    """Cut the power `num_cuts` times, at instants drawn from the seed."""
    told = in_private_mounts(lambda: _run(subject, work, seed, num_cuts, first))
    tally = Tally()
    for name, value in told.items():
        setattr(tally, name, value)
    return tally


def _run(subject: Subject, work: Path, seed: int, num_cuts: int, first: int) -> dict[str, Any]:
    folder = fresh(work / "power")
    tally = Tally()
    tally.more["copies_discarded"] = 0
    started_s = time.monotonic()
    make_image(folder / "image", size_bytes=_IMAGE_BYTES)
    with mounted(folder / "image", folder / "disk"):
        device = _loop_device(folder / "image")
        for case in range(first, first + num_cuts):
            _cut(subject, folder, device, seed, case, tally)
    shutil.rmtree(folder)
    tally.seconds = time.monotonic() - started_s
    return vars(tally)


def _loop_device(image: Path) -> Path:
    listed = subprocess.run(
        ["losetup", "-j", str(image)], check=True, capture_output=True, text=True
    ).stdout
    return Path("/sys/block") / Path(listed.split(":", 1)[0]).name


def _cut(subject: Subject, folder: Path, device: Path, seed: int, case: int, tally: Tally) -> None:
    rng = random.Random(f"{seed}-{case}")  # noqa: S311 - a replayable draw, not a secret
    root = folder / "disk" / f"run-{case}" / "checkpoints"
    puppet = Puppet(subject, root, generation=1)
    acknowledged = 0
    try:
        for step in range(1, 1 + rng.randint(1, 3)):
            if puppet.save(step) != "":
                tally.add("child failed", f"cut {case}: step {step} was not saved")
                return
            acknowledged = step
        delay_s = 0.0
        if rng.random() < 0.7:  # inside the next save; else right after an acknowledgement
            puppet.order(acknowledged + 1)
            delay_s = rng.uniform(0.0, 0.02)
            time.sleep(delay_s)
        os.kill(puppet.pid, signal.SIGSTOP)
        acknowledged += puppet.answered()
        _copy_at_rest(folder, device, tally)
    finally:
        os.kill(puppet.pid, signal.SIGKILL)
        puppet.end()
    tally.num_faults += 1
    tally.num_acknowledged += acknowledged
    with mounted(folder / "copy", folder / "after"):
        outcome, why = classify(
            subject, folder / "after" / f"run-{case}" / "checkpoints", acknowledged
        )
    (folder / "copy").unlink()
    shutil.rmtree(root.parent)
    again = f"--only power --seed {seed} --first {case} --cuts 1"
    tally.add(
        outcome,
        f"cut {case}, {delay_s * 1e3:.1f} ms into the save after step {acknowledged}: {why}; "
        f"again: python -m gangline.orchestrator.bench_checkpoint {again}",
    )


def _copy_at_rest(folder: Path, device: Path, tally: Tally) -> None:
    for _ in range(_MAX_COPIES):
        before = _writes(device)
        subprocess.run(
            ["cp", "--sparse=always", str(folder / "image"), str(folder / "copy")], check=True
        )
        if _writes(device) == before:
            return
        tally.more["copies_discarded"] += 1
    raise RuntimeError(f"the kernel wrote to {device.name} during each of {_MAX_COPIES} copies")


def _writes(device: Path) -> tuple[str, str]:
    fields = (device / "stat").read_text().split()
    return fields[4], fields[8]  # writes completed, requests in flight
