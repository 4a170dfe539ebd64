"""Faults of what a job leans on: its disk, its MLflow server."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

from gangline.orchestrator.faults import DiskFull, MlflowDown
from gangline.orchestrator.faults_stage import Aim, Begun, Stage, wait_for
from gangline.orchestrator.timeline import Proof

_FILLER = ".filler"
_MAX_PIECE_BYTES, _BLOCK_BYTES = 2**22, 2**12
# The job may free a block now and then (a pruned checkpoint); it is taken as soon as seen.
_REFILL_EVERY_S = 0.005
_SERVER_TIMEOUT_S = 60.0


def disk_full(fault: DiskFull, aim: Aim, stage: Stage) -> Begun:
    """Fill the scratch disk of a host, and keep it full."""
    del fault, stage
    host = aim.the_host
    folder = host.path(host.scratch)
    free_before = _free_bytes(folder)
    filler = _Filler(folder / _FILLER)
    at = time.time()
    filler.fill()
    free = _free_bytes(folder)
    full = Proof("free on the scratch disk", f"{free_before} -> {free} B", free == 0 < free_before)
    filler.start()

    def empty() -> list[Proof]:
        refused = _write_is_refused(folder)
        filler.stop()
        free_after = _free_bytes(folder)
        return [
            Proof("a write at the end", refused or "went through", bool(refused)),
            Proof("free again", f"{free_after} B", free_after > 0),
        ]

    return Begun(at, [full], empty)


class _Filler(threading.Thread):
    """A file that takes every free block of its disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(name=f"filler of {path}", daemon=True)
        self._path = path
        self._stop_asked = threading.Event()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def fill(self) -> None:
        """Take what is free now, in pieces: one that does not fit is given back as a whole."""
        piece = _MAX_PIECE_BYTES
        while piece >= _BLOCK_BYTES:
            try:
                os.posix_fallocate(self._fd, os.fstat(self._fd).st_size, piece)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                piece //= 2

    def run(self) -> None:
        """Keep it full until asked to stop."""
        while not self._stop_asked.wait(_REFILL_EVERY_S):
            self.fill()

    def stop(self) -> None:
        """Give all of it back."""
        self._stop_asked.set()
        self.join()
        self._path.unlink()
        os.close(self._fd)


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _write_is_refused(folder: Path) -> str:
    """Return the error of writing one block, empty when it went through."""
    path = folder / ".probe"
    try:
        path.write_bytes(b"0" * 65536)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        path.unlink(missing_ok=True)
    return ""


def mlflow_down(fault: MlflowDown, aim: Aim, stage: Stage) -> Begun:
    """Kill the MLflow server with all its processes; start it again at the end."""
    del aim
    server = stage.mlflow
    assert server is not None, "the aim was at it"
    answered = server.is_answering()
    at = time.time()
    num_killed = server.kill()
    killed = Proof("processes killed", str(num_killed), num_killed > 0)
    down = Proof("answered before, and now", f"{answered}, {server.is_answering()}", answered)

    def again() -> list[Proof]:
        is_down = not server.is_answering()
        silent = Proof("silent to the end", str(is_down), is_down)
        if fault.for_s is None:
            return [silent]
        server.start()
        took_s = wait_for(server.is_answering, _SERVER_TIMEOUT_S)
        found = f"after {took_s:.1f} s" if took_s is not None else "never"
        return [
            silent,
            Proof("answers again", found, took_s is not None),
        ]

    return Begun(at, [killed, down], again)
