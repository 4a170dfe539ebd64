"""Durable files: bytes reach the disk before the name that vouches for them does.

Everything here is free of torch, so that the controller, the command line and a fork loop of a
test can use it. What is read is read without trust: by descriptor, without following links, and
never more than was asked for.

Exceptions::

    CheckpointError              the root; catch this one
    |- CorruptCheckpointError    a file is not what its manifest says; carries .file and .reason
    |- StaleGenerationError      a newer generation has fenced this one; its commit is void
    |- WriterLockedError         another live process writes into this folder
    `- NoSpaceError              refused before the first byte: the file system has no room
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

# One hash call per MiB keeps verification out of the allocator; the writer hashes whole buffers.
_HASH_BLOCK_BYTES = 1 << 20


class CheckpointError(RuntimeError):
    """Say why a checkpoint could not be written, read or committed."""


class CorruptCheckpointError(CheckpointError):
    """Name the file of a checkpoint that is not what its manifest says, and the reason."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file}: {reason}; this checkpoint is not used, older ones are")
        self.file = file
        self.reason = reason


class StaleGenerationError(CheckpointError):
    """Refuse a commit of a generation that a newer one has replaced."""


class WriterLockedError(CheckpointError):
    """Refuse a second writer of one folder."""


class NoSpaceError(CheckpointError):
    """Refuse to begin a checkpoint that does not fit."""


@dataclass(frozen=True)
class FileRecord:
    """Describe one file as the manifest does."""

    num_bytes: int
    sha256: str  # 64 lower-case hexadecimal digits


@dataclass
class WrittenFile:
    """Report one file that is on the disk, and where its time went."""

    name: str
    record: FileRecord
    parts_s: dict[str, float] = field(default_factory=dict)  # "hash", "write", "fsync"


def fsync_folder(folder: Path) -> None:
    """Make the names inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create `folder` with its parents and make every name on the way to it durable.

    Guarantees: after the return a power cut cannot take the folder away. A run folder whose own
    name was never synced loses every checkpoint inside it at once, however well they were written;
    so the parents are synced also where somebody else has just made them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.absolute()
    device = folder.stat().st_dev
    for parent in folder.parents:
        try:
            if parent.stat().st_dev != device:
                return
            fsync_folder(parent)
        except PermissionError:  # not ours, so not made by us
            return


def write_durable(
    folder: Path, name: str, parts: Sequence[bytes | bytearray | memoryview]
) -> WrittenFile:
    """Write a new file from `parts`, hash it, and sync it; few system calls, few Python steps.

    The digest is taken from the memory that is written, not from what comes back from the disk:
    a disk that lies is caught at load. hashlib and os.writev release the GIL for large buffers.

    Raises: OSError as the kernel gives it. The partial file is left for whoever owns the folder.
    """
    start_s = time.monotonic()
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    hashed_s = time.monotonic()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(folder / name, flags, 0o644)
    try:
        num_bytes = _write_all(fd, parts)
        written_s = time.monotonic()
        os.fsync(fd)
    finally:
        os.close(fd)
    times = {
        "hash": hashed_s - start_s,
        "write": written_s - hashed_s,
        "fsync": time.monotonic() - written_s,
    }
    return WrittenFile(name, FileRecord(num_bytes, digest.hexdigest()), times)


def _write_all(fd: int, parts: Sequence[bytes | bytearray | memoryview]) -> int:
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    total = 0
    while views:
        num_written = os.writev(fd, views[:1024])  # IOV_MAX
        total += num_written
        while views and num_written >= len(views[0]):
            num_written -= len(views[0])
            views.pop(0)
        if num_written:
            views[0] = views[0][num_written:]
    return total


@contextmanager
def opened_folder(folder: Path) -> Iterator[int]:
    """Open `folder` itself, never what a symbolic link in its place points to."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise CorruptCheckpointError(folder, f"not a readable folder ({error.strerror})") from error
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _opened_file(folder: Path, folder_fd: int, name: str) -> Iterator[tuple[int, int]]:
    # O_NONBLOCK: a planted FIFO must not hang the reader.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=folder_fd)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(folder / name, "missing") from error
    except OSError as error:
        raise CorruptCheckpointError(
            folder / name, f"cannot be opened ({error.strerror})"
        ) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpointError(folder / name, "not a regular file")
        yield fd, status.st_size
    finally:
        os.close(fd)


def read_capped(folder: Path, folder_fd: int, name: str, *, max_bytes: int) -> bytes:
    """Read one whole file that may not be larger than `max_bytes`."""
    with _opened_file(folder, folder_fd, name) as (fd, num_bytes):
        if num_bytes > max_bytes:
            reason = f"{num_bytes} bytes, more than the {max_bytes} that such a file may have"
            raise CorruptCheckpointError(folder / name, reason)
        return bytes(_read_all(folder / name, fd, num_bytes))


def read_verified(folder: Path, folder_fd: int, name: str, record: FileRecord) -> bytearray:
    """Read one whole file and return it only if it is what `record` says.

    Guarantees: the returned bytes are the bytes that were hashed; the file is not read again.
    """
    with _opened_file(folder, folder_fd, name) as (fd, num_bytes):
        _check_size(folder / name, num_bytes, record)
        data = _read_all(folder / name, fd, num_bytes)
    _check_digest(folder / name, hashlib.sha256(data).hexdigest(), record)
    return data


def check_file(
    folder: Path, folder_fd: int, name: str, record: FileRecord, *, header: bytes
) -> None:
    """Raise unless the file has the recorded size and digest and begins with `header`.

    Reads in blocks, so that a file larger than the memory can be checked.
    """
    with _opened_file(folder, folder_fd, name) as (fd, num_bytes):
        _check_size(folder / name, num_bytes, record)
        digest = hashlib.sha256()
        block = bytearray(_HASH_BLOCK_BYTES)
        first = b""
        while num_read := _read_into(folder / name, fd, memoryview(block)):
            digest.update(memoryview(block)[:num_read])
            if len(first) < len(header):
                first += bytes(block[: min(num_read, len(header) - len(first))])
    _check_digest(folder / name, digest.hexdigest(), record)
    if first != header:
        raise CorruptCheckpointError(folder / name, HEADER_DIFFERS)


HEADER_DIFFERS = "its safetensors header is not the one that the manifest describes"


def _check_size(file: Path, num_bytes: int, record: FileRecord) -> None:
    if num_bytes != record.num_bytes:
        reason = f"{num_bytes} bytes, the manifest says {record.num_bytes}"
        raise CorruptCheckpointError(file, reason)


def _check_digest(file: Path, got: str, record: FileRecord) -> None:
    if got != record.sha256:
        reason = f"SHA-256 {got[:12]}..., the manifest says {record.sha256[:12]}..."
        raise CorruptCheckpointError(file, reason)


def _read_all(file: Path, fd: int, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    num_read = _read_into(file, fd, memoryview(data))
    if num_read != num_bytes:
        raise CorruptCheckpointError(file, f"ended after {num_read} of {num_bytes} bytes")
    return data


def _read_into(file: Path, fd: int, view: memoryview) -> int:
    filled = 0
    while filled < len(view):
        try:
            num_read = os.readv(fd, [view[filled:]])
        except OSError as error:
            raise CorruptCheckpointError(file, f"cannot be read ({error.strerror})") from error
        if num_read == 0:
            break
        filled += num_read
    return filled


class FolderLock:
    """Hold a folder for one process; the kernel lets go when the process ends, however it ends.

    An advisory flock: it keeps a second run out of a folder, it does not stop a process that does
    not ask. On a network file system it works between hosts only as far as flock does there.
    Whoever unlinks the file breaks the lock: the holder keeps the old inode, the next one gets a
    new file.

    Raises: WriterLockedError with the holder's identity.
    """

    def __init__(self, file: Path, *, timeout_s: float = 0.0) -> None:
        self._file = file
        self._fd: int | None = None
        deadline_s = time.monotonic() + timeout_s
        while not self._try_acquire():
            if time.monotonic() >= deadline_s:
                raise WriterLockedError(
                    f"{file} is held by another process ({self._holder()}); "
                    "end that run, or give this one another run folder"
                )
            time.sleep(0.005)

    def _try_acquire(self) -> bool:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._file, flags, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another inode under the name: the file was unlinked between the open and the lock.
            current = os.stat(self._file, follow_symlinks=False)
            if current.st_ino != os.fstat(fd).st_ino:
                os.close(fd)
                return False
        except (BlockingIOError, FileNotFoundError):
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._sign(fd)
        return True

    @staticmethod
    def _sign(fd: int) -> None:
        # For the message of whoever is refused; never read as a fact.
        identity = json.dumps({"pid": os.getpid(), "host": os.uname().nodename})
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, identity.encode(), 0)
        except OSError:  # a full disk must not keep anybody from taking the lock
            return

    def _holder(self) -> str:
        try:
            return self._file.read_bytes()[:256].decode("utf-8", "replace").strip() or "unknown"
        except OSError:
            return "unknown"

    def release(self) -> None:
        """Let go; harmless when already released."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            # Unlocked first, so that nobody is kept out by a close that fails; nothing was
            # written that a failing close could have lost.
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
            with suppress(OSError):
                os.close(fd)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
