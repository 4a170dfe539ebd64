"""Commit a checkpoint so that a crash, a power cut or a stale writer at any instant loses nothing.

The folder of a run's checkpoints::

    step-00000050/            committed: manifest.json and the data files that it vouches for
    .tmp-00000060-3-<id>/     an attempt at step 60 by generation 3
    .trash-00000030-3-<id>/   on its way out
    .fence-000000000003       the newest generation that may commit; the name is the value
    .fence.lock .writer.lock  flocks

An attempt is written and synced under its temporary name, then renamed to its final one under
`CommitFence.guard`, then the root is synced; only then is it acknowledged. What has a final name
is complete, and is never written again.

The fence has two halves. `advance` raises the admitted generation, which `guard` compares under
the same flock: that refuses every attempt that comes to its commit later. And `advance` renames
the attempts of all older generations away: that takes the folder from under a writer that was
stopped between the comparison and its rename. So `advance` need not wait for a stopped holder of
the flock; after `lock_timeout_s` it breaks the lock.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gangline.trainers.commit_files import (
    CheckpointError,
    CorruptCheckpointError,
    FileRecord,
    FolderLock,
    NoSpaceError,
    StaleGenerationError,
    WriterLockedError,
    WrittenFile,
    fsync_folder,
    make_folder,
    write_durable,
)
from gangline.trainers.commit_verify import (
    CheckpointInfo,
    FileFinding,
    Verification,
    list_checkpoints,
    newest,
    read_manifest,
    step_folders,
    step_name,
    verify,
)

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "CommitFence",
    "CommitOutcome",
    "CorruptCheckpointError",
    "FileFinding",
    "FileRecord",
    "FolderLock",
    "NoSpaceError",
    "StaleGenerationError",
    "Verification",
    "WriterLockedError",
    "WrittenFile",
    "begin",
    "commit",
    "discard",
    "list_checkpoints",
    "lock_writer",
    "make_folder",
    "newest",
    "read_manifest",
    "require_room",
    "step_folders",
    "step_name",
    "verify",
    "write_durable",
]

_ATTEMPT = re.compile(r"\.(tmp|trash)-\d{8,18}-(\d{1,18})-[0-9a-f-]{1,64}", re.ASCII)
_FENCE = re.compile(r"\.fence-(\d{12})", re.ASCII)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class CommitFence:
    """Admit the commits of one generation, and of no older one, ever again.

    `advance` is called by the one controller of a run before a new generation starts; `guard` is
    held by rank 0 around each commit.

    Guarantees: after `advance(g)` has returned, no commit of a generation below g takes place,
    whatever its writer was doing; the value survives a power cut. It needs no disk space but a
    directory entry, so that a full disk does not keep a job from recovering.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(root)
        self._lock_file = self._root / ".fence.lock"

    @property
    def generation(self) -> int:
        """Read the newest generation that has been admitted; 0 where there was none."""
        return max(self._values(), default=0)

    def _values(self) -> list[int]:
        if not self._root.is_dir():
            return []
        matches = (_FENCE.fullmatch(name) for name in os.listdir(self._root))
        return [int(match[1]) for match in matches if match]

    def advance(self, generation: int, *, lock_timeout_s: float = 2.0) -> None:
        """Fence every generation below `generation`, durably; the same value again is harmless.

        Raises: StaleGenerationError where a newer generation has been admitted already; OSError
        where the folder cannot be written.
        """
        if not 0 <= generation < 10**12:
            raise ValueError(f"generation {generation} is not within 0 and 10^12")
        if not self._values():  # later, the way to the root is durable already
            make_folder(self._root)
        try:
            lock: FolderLock | None = FolderLock(self._lock_file, timeout_s=lock_timeout_s)
        except WriterLockedError:
            lock = None  # its holder is stopped; see the second half of the fence above
        try:
            current = self._values()
            self._refuse_older(generation, max(current, default=0))
            self._file(generation).touch()
            # Durable before any older name goes: at no instant is there no fence.
            fsync_folder(self._root)
            for old in set(current) - {generation}:
                self._file(old).unlink(missing_ok=True)
            self._void_attempts(generation)
            if max(current, default=0) < generation:
                (self._root / ".writer.lock").unlink(missing_ok=True)
            if lock is None:
                self._lock_file.unlink(missing_ok=True)
            fsync_folder(self._root)
        finally:
            if lock is not None:
                lock.release()

    def _file(self, generation: int) -> Path:
        return self._root / f".fence-{generation:012d}"

    def _refuse_older(self, generation: int, admitted: int) -> None:
        if generation < admitted:
            raise StaleGenerationError(
                f"generation {generation} of {self._root} has been replaced by generation "
                f"{admitted}; this process must end, its checkpoint is not committed"
            )

    def _void_attempts(self, generation: int) -> None:
        for path, kind, owner in attempts(self._root):
            if kind == "tmp" and owner < generation:
                # Gone already: committed or dropped before this call, which is as good.
                with suppress(FileNotFoundError):
                    to_trash(path, path.name.split("-")[1], owner)

    @contextmanager
    def guard(self, generation: int, *, timeout_s: float = 30.0) -> Iterator[None]:
        """Hold the fence around a commit of `generation`.

        Raises: StaleGenerationError where the generation is fenced; WriterLockedError where the
        lock cannot be had within `timeout_s`.
        """
        with FolderLock(self._lock_file, timeout_s=timeout_s):
            self._refuse_older(generation, self.generation)
            yield


def attempts(root: Path) -> list[tuple[Path, str, int]]:
    """List the temporary folders of `root`: path, "tmp" or "trash", generation of its writer."""
    matches = ((entry, _ATTEMPT.fullmatch(entry.name)) for entry in root.iterdir())
    return [(entry, match[1], int(match[2])) for entry, match in matches if match]


def to_trash(path: Path, step: str, generation: int) -> Path:
    """Take a folder's name away in one step; what it is called then is nobody's checkpoint."""
    trash = path.with_name(f".trash-{step}-{generation}-{uuid.uuid4().hex[:12]}")
    os.rename(path, trash)
    return trash


def lock_writer(root: Path) -> FolderLock:
    """Make this process the only writer of the generation that the fence of `root` admits.

    Raises: WriterLockedError where another live process is. `advance` to a newer generation frees
    the lock of a stopped older one.
    """
    return FolderLock(root / ".writer.lock")


def begin(root: Path, *, step: int, generation: int, attempt: str) -> Path:
    """Make the folder of an attempt; every rank calls it, with the same `attempt`, in any order."""
    folder = root / f".tmp-{step:08d}-{generation}-{attempt}"
    assert _ATTEMPT.fullmatch(folder.name), f"{folder.name} would never be cleaned"
    folder.mkdir(exist_ok=True)
    return folder


def require_room(root: Path, num_bytes: int, *, factor: float, folder: Path) -> None:
    """Refuse an attempt that does not fit, before its first byte.

    `num_bytes` is the whole checkpoint of all ranks. What other ranks have put into `folder`
    already counts as room, so that a rank that comes late sees what the first one saw.

    Raises: NoSpaceError with path, need and have.
    """
    status = os.statvfs(root)
    free, needed = status.f_bavail * status.f_frsize, int(num_bytes * factor)
    if free < needed and folder.is_dir():
        free += sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder))
    if free < needed:
        raise NoSpaceError(
            f"no room in {root}: {free} bytes free, a checkpoint of {num_bytes} bytes needs "
            f"{needed} ({factor:g} times its size); free some space, the next save tries again"
        )


@dataclass(frozen=True)
class CommitOutcome:
    """Say what became of an attempt."""

    path: Path
    kept: bool  # True: this step was there already and verified, so this attempt was dropped
    note: str = ""  # what an operator should know, e.g. which corrupt file was replaced


def commit(folder: Path, *, step: int, generation: int, fence: CommitFence) -> CommitOutcome:
    """Give a complete attempt its final name, once everything below that name is on the disk.

    A step that exists already, from an older generation, wins where it verifies: it may have been
    loaded, and what has been acknowledged is never replaced. Where it does not verify, the two
    folders change places in one step, and the corrupt one is removed.

    Raises: StaleGenerationError; CheckpointError; OSError (then nothing was acknowledged; the
    step may or may not be there, and is complete if it is).
    Guarantees: after the return the step survives a power cut.
    """
    root, final = folder.parent, folder.with_name(step_name(step))
    note = ""
    with fence.guard(generation):
        try:
            fsync_folder(folder)
            if not os.path.lexists(final):
                os.rename(folder, final)
            else:
                verification = verify(final)
                if verification.ok:
                    fsync_folder(root)
                    discard(folder)
                    return CommitOutcome(final, kept=True, note="this step verified already")
                _exchange(folder, final)
                note = f"replaced a corrupt checkpoint of this step ({verification.problem})"
        except FileNotFoundError as error:
            raise StaleGenerationError(
                f"{folder} is gone: generation {generation} has been fenced; "
                "its checkpoint is not committed"
            ) from error
        fsync_folder(root)
    if note:
        discard(folder)
    return CommitOutcome(final, kept=False, note=note)


def _exchange(first: Path, second: Path) -> None:
    # One step, so that a stopped writer that has been fenced meanwhile moves nothing: its own
    # folder is gone, and then neither name changes. Python has no wrapper of renameat2.
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise CheckpointError(f"{second} is corrupt and in the way; remove it by hand")
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)):
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOSYS):  # e.g. a network file system
            raise CheckpointError(f"{second} is corrupt and in the way; remove it by hand")
        raise OSError(number, os.strerror(number), os.fspath(second))


def discard(folder: Path) -> None:
    """Remove an attempt or trash as far as possible; what stays, a later generation cleans."""
    shutil.rmtree(folder, ignore_errors=True)
