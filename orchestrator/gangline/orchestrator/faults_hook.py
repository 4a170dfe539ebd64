"""What a worker does in a lab only: hold its interpreter's lock when a scenario asks for it.

A C extension that loops without releasing the GIL cannot be imitated from outside. So each worker
that finds the lab's folder on its host waits for a request there. The folder is on the /dev/shm of
a virtual host, made by `gangline lab run`, and must belong to this user alone; on a real machine
there is none, and `listen_in_a_lab` does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import stat
import sys
import threading
import time
from pathlib import Path

FOLDER = Path("/dev/shm/gangline-faults")  # noqa: S108 - checked to be this user's alone
_LOOK_EVERY_S = 0.05
_NO_SWITCH_S = 4000.0  # about the longest that usleep takes


def request_path(pid: int) -> Path:
    """Return where a request to a process is put, by its pid on its host: seconds, as JSON."""
    return FOLDER / f"hold-gil-{pid}"


def answer_path(pid: int) -> Path:
    """Return the answer's place: empty while the GIL is held, then the seconds that it was."""
    return FOLDER / f"held-gil-{pid}"


def listen_in_a_lab() -> None:
    """Start to listen for requests, if this process runs on a host of a lab."""
    try:
        found = os.lstat(FOLDER)
    except FileNotFoundError:
        return
    is_ours = found.st_uid == os.getuid() and not found.st_mode & 0o077
    if not stat.S_ISDIR(found.st_mode) or not is_ours:
        return
    threading.Thread(target=_listen, name="lab faults", daemon=True).start()


def _listen() -> None:
    request, answer = request_path(os.getpid()), answer_path(os.getpid())
    while True:
        time.sleep(_LOOK_EVERY_S)
        with contextlib.suppress(FileNotFoundError):
            hold_s = float(json.loads(request.read_text()))
            request.unlink()
            held_s = hold_gil(hold_s, answer)
            answer.write_text(f"{held_s:.3f}")


def hold_gil(hold_s: float, answer: Path) -> float:
    """Sleep without releasing the GIL; return for how long.

    `answer` appears when it is held: the C library makes the file, for Python's own `open` lets go
    of the lock. A PyDLL, unlike a CDLL, calls with the lock held, and no other thread can ask for
    it between two calls while the switch interval lasts.
    """
    library = ctypes.PyDLL(None)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(_NO_SWITCH_S)
    try:
        descriptor = library.creat(os.fsencode(answer), 0o600)
        start_s = time.monotonic()
        library.usleep(ctypes.c_uint(int(hold_s * 1e6)))
        held_s = time.monotonic() - start_s
    finally:
        sys.setswitchinterval(interval_s)
    os.close(descriptor)
    return held_s
