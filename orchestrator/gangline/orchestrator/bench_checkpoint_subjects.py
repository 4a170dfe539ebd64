"""What `gangline bench checkpoint` tests: our checkpoints, and stock DCP as it is used.

All three save the same tensors, whose every element says which step they are of, so that a load
that mixes steps, or invents values, is seen. Stock DCP gets the two habits that are common: one
folder that is written over, and a folder per step, of which the one with the highest name is
loaded and the last two are kept.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from gangline.comm.mesh import Mesh
from gangline.trainers.checkpoint import Checkpointer, Shard, load, newest
from gangline.trainers.checkpoint_storage import MAX_FILE_BYTES, ROOM_FACTOR

NUM_TENSORS = 4
_PR_SET_PDEATHSIG = 1
DEFAULT_ELEMENTS = 1 << 14  # of each tensor: 256 KiB in all, so that many saves fit a test


class SaveFailedError(RuntimeError):
    """Report a save that says itself that it has failed."""


@dataclass(frozen=True)
class Found:
    """Say what a restart would find."""

    step: int | None  # None: nothing can be loaded
    problem: str = ""  # why nothing was, or what is wrong with what was


class Session(Protocol):
    """Save steps in one process, as one generation of a run."""

    def save(self, step: int) -> None:
        """Return when the step is acknowledged; raise SaveFailedError when it is refused."""

    def close(self) -> None:
        """End the session."""


class Subject(Protocol):
    """One way to keep checkpoints."""

    @property
    def name(self) -> str:
        """Name it in the table."""

    def start(self, root: Path, generation: int) -> Session:
        """Open `root` for saving."""

    def find(self, root: Path) -> Found:
        """Load what a restart would load, and check every element."""

    def folder(self, root: Path) -> Path:
        """Return the folder of the newest checkpoint."""


def tensors_of(step: int, num_elements: int) -> dict[str, torch.Tensor]:
    """Make the tensors of a step; tensor i is full of 8 step + i."""
    return {f"w{i}": torch.full((num_elements,), float(8 * step + i)) for i in range(NUM_TENSORS)}


def judge(tensors: dict[str, torch.Tensor]) -> Found:
    """Tell of which step the loaded tensors are, and whether all of them are."""
    step = int(tensors["w0"][0].item()) // 8 if tensors["w0"].numel() else -1
    for i in range(NUM_TENSORS):
        if not bool((tensors[f"w{i}"] == float(8 * step + i)).all()):
            return Found(step, f"loaded without an error, but w{i} is not that of step {step}")
    return Found(step)


@dataclass(frozen=True)
class Ours:
    """Our Checkpointer, one rank."""

    asynchronous: bool = False
    num_elements: int = DEFAULT_ELEMENTS
    room_factor: float = ROOM_FACTOR
    max_file_bytes: int = MAX_FILE_BYTES
    name: str = "gangline"

    def start(self, root: Path, generation: int) -> Session:
        return _OurSession(self, root, generation)

    def find(self, root: Path) -> Found:
        problems: list[str] = []
        info = newest(root, report=problems.append)
        if info is None:
            return Found(None, "; ".join(problems) or "no checkpoint verifies")
        tensors = tensors_of(-1, self.num_elements)
        load(info, {name: Shard.whole(t) for name, t in tensors.items()}, Mesh.single())
        found = judge(tensors)
        if not found.problem and found.step != info.step:
            return Found(found.step, f"the manifest says step {info.step}")
        return found

    def folder(self, root: Path) -> Path:
        return max(root.glob("step-*"))


class _OurSession:
    def __init__(self, subject: Ours, root: Path, generation: int) -> None:
        self._num_elements = subject.num_elements
        self._checkpointer = Checkpointer(
            root,
            mesh=Mesh.single(generation=generation),
            keep=2,
            asynchronous=subject.asynchronous,
            config_digest="bench",
            room_factor=subject.room_factor,
            max_file_bytes=subject.max_file_bytes,
        )

    def save(self, step: int) -> None:
        state = {n: Shard.whole(t) for n, t in tensors_of(step, self._num_elements).items()}
        self._checkpointer.save(step, state, {"cursor": step})
        self._checkpointer.wait()
        (event,) = self._checkpointer.poll()
        if event.status == "failed":
            raise SaveFailedError(event.reason)

    def close(self) -> None:
        self._checkpointer.close()


@dataclass(frozen=True)
class Stock:
    """`torch.distributed.checkpoint` with its own file system storage and planner."""

    per_step: bool
    num_elements: int = DEFAULT_ELEMENTS

    @property
    def name(self) -> str:
        return "DCP, folder per step" if self.per_step else "DCP, one folder"

    def start(self, root: Path, generation: int) -> Session:
        root.mkdir(parents=True, exist_ok=True)
        return _StockSession(self, root)

    def find(self, root: Path) -> Found:
        tensors: dict[str, Any] = dict(tensors_of(-1, self.num_elements))
        try:
            with quiet_dcp():
                dcp_load(tensors, checkpoint_id=self.folder(root), no_dist=True)
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - whatever it meets
            return Found(
                None, f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}"
            )
        return judge(tensors)

    def folder(self, root: Path) -> Path:
        if not self.per_step:
            return root / "latest"
        return max(root.glob("step-*"), default=root / "none")


class _StockSession:
    def __init__(self, subject: Stock, root: Path) -> None:
        self._subject = subject
        self._root = root

    def save(self, step: int) -> None:
        per_step = self._subject.per_step
        folder = self._root / (f"step-{step:08d}" if per_step else "latest")
        state: dict[str, Any] = dict(tensors_of(step, self._subject.num_elements))
        try:
            with quiet_dcp():
                dcp_save(state, checkpoint_id=folder, no_dist=True)
        except (Exception, CheckpointException) as error:
            raise SaveFailedError(str(error).strip().splitlines()[-1][:200]) from error
        for old in sorted(self._root.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    def close(self) -> None:
        return


@contextmanager
def quiet_dcp() -> Iterator[None]:
    """Silence what DCP says about running without a process group, and about what it misses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def subjects(num_elements: int = DEFAULT_ELEMENTS) -> list[Subject]:
    """List what is compared, ours first."""
    return [
        Ours(num_elements=num_elements),
        Stock(per_step=True, num_elements=num_elements),
        Stock(per_step=False, num_elements=num_elements),
    ]


def fresh(folder: Path) -> Path:
    """Return `folder`, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def fork_child() -> int:
    """Fork; the child dies with this process, however that ends."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    return pid


def end_child(code: int) -> None:
    """Leave a forked child without running what its parent has registered."""
    os._exit(code)


__all__ = [
    "Found",
    "Ours",
    "SaveFailedError",
    "Session",
    "Stock",
    "Subject",
    "end_child",
    "fork_child",
    "fresh",
    "subjects",
]
