"""Where the rings of a run stand on this machine, and when they go.

/dev/shm/gangline-<uid>/<run>/<pid>-<n>.ring       private to the user (mode 0700)

Every process of a run holds a shared flock on the run's folder. The kernel takes it away when the
process ends, however it ends, and it works across PID namespaces; so a folder on which an exclusive
lock can be had is one that nobody uses.

- A group that is destroyed, or whose process ends in order, takes its ring with it.
- The rings of a killed process stay, readable, while any other process of the run lives. Of these
  the newest `NUM_DEAD_KEPT` are kept, so that a job that dies again and again fills no memory.
- The last process of the run to end in order removes the folder.
- When all were killed, the next `hold` of any run of this user on this machine removes it.

Torch-free.
"""

import contextlib
import fcntl
import os
import re
import stat
import zlib
from pathlib import Path

from gangline.comm.events import Ring, RingError, list_rings
from gangline.comm.ring_format import RING_SUFFIX

NUM_DEAD_KEPT = 32
# Only folders that bear it are ever removed, so that a wrong path costs nobody their files.
_MARK = ".gangline-rings"
_NUM_TRIES = 1000


def rings_root() -> Path:
    """Return where this user's runs have their folders."""
    return Path(f"/dev/shm/gangline-{os.getuid()}")  # noqa: S108 - made private, and checked


def ring_folder(run_dir: str | Path) -> Path:
    """Return the folder for the rings of the run with this run folder, the same on every call."""
    path = os.path.abspath(run_dir)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(path))[:64]
    return rings_root() / f"{name}-{zlib.crc32(path.encode()):08x}"


class FolderHold:
    """Hold a run's folder: while anyone does, it stays.

    A fork shares the hold of its parent; give it one of its own if it makes rings.
    """

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be and hold it; sweep away what dead runs left beside it.

        Raises: OSError when it cannot be made, or is not private to this user.
        """
        self.folder = folder
        make_private(folder.parent)
        sweep(folder.parent)
        self._fd = _hold(folder)

    def release(self) -> None:
        """Let go; remove the folder if this was the last hold. Idempotent."""
        if self._fd >= 0:
            self.forget()
            _remove_unless_held(self.folder)

    def forget(self) -> None:
        """Let go and leave the folder as it is: for a fork, of what it has from its parent."""
        if self._fd >= 0:
            # Not LOCK_UN, which would end the hold for all who share it.
            os.close(self._fd)
            self._fd = -1


def make_private(folder: Path) -> None:
    """Make a folder that only this user can use. Raises: OSError when it cannot be one."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_ours or status.st_mode & 0o022:
        raise PermissionError(
            f"{folder} must be a folder that only this user can write; remove it or mend its mode"
        )


def sweep(root: Path) -> list[Path]:
    """Remove the folders below `root` that nobody holds; return them."""
    return [Path(entry.path) for entry in os.scandir(root) if _remove_unless_held(Path(entry.path))]


def drop_oldest_dead(folder: Path, num_kept: int = NUM_DEAD_KEPT) -> None:
    """Remove rings of dead processes, the oldest first, until `num_kept` are left."""
    dead = []
    for path in list_rings(folder):
        with contextlib.suppress(RingError, OSError), Ring.open(path) as ring:
            if ring.writer_is_alive() is False:
                dead.append((ring.created_ns, path))
    for _, path in sorted(dead)[: max(len(dead) - num_kept, 0)]:
        path.unlink(missing_ok=True)


def _hold(folder: Path) -> int:
    # Another process may remove the folder, as its last holder or in a sweep, at any moment before
    # our lock; then it is made anew.
    for _ in range(_NUM_TRIES - 1):
        with contextlib.suppress(FileNotFoundError):
            return _try_to_hold(folder)
    return _try_to_hold(folder)


def _try_to_hold(folder: Path) -> int:
    """Return a descriptor that holds it. Raises: FileNotFoundError when it went meanwhile."""
    make_private(folder)
    fd = _open_folder(folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # waits at most for a sweep that is removing it
        if os.lstat(folder).st_ino != os.fstat(fd).st_ino:
            raise FileNotFoundError(f"{folder} was removed and made again")
        mark = os.open(_MARK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=fd)
        os.close(mark)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove_unless_held(folder: Path) -> bool:
    try:
        fd = _open_folder(folder)
    except OSError:  # gone, no folder, or not ours
        return False
    try:
        names = os.listdir(fd)
        if _MARK not in names:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in os.listdir(fd):
            if name == _MARK or RING_SUFFIX in name:
                os.unlink(name, dir_fd=fd)
        os.rmdir(folder)
    except OSError:  # held, or another sweep is at it, or something else lies in it
        return False
    finally:
        os.close(fd)
    return True


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
