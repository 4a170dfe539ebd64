"""The run folder's two state files: the controller's journal and the newest status.

The journal is the truth. A controller appends what it is about to do or has just learnt, and a
controller that was killed reads it back and goes on. The status file is for people and tools: it
can be rebuilt at any time and is replaced, never appended to.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# How long an event waits for room on a full disk. Without it on disk nothing may be done anyway.
_ROOM_TIMEOUT_S = 600.0
_TRY_EVERY_S = 0.2


class Journal:
    """Append events to `journal.jsonl`, each on disk before `append` returns.

    Guarantees: an event that `append` returned is read back by every later `Journal` on the same
    file, also after SIGKILL or power loss; a torn last line (a crash in mid-write) is cut off when
    the file is opened for writing and skipped when it is only read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.events: list[Record] = list(read_journal(path))
        if path.exists():
            _cut_torn_tail(path)
        self._next_seq = self.events[-1]["seq"] + 1 if self.events else 0
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the journal

    def append(self, event: str, message: str, *, generation: int, **fields: Any) -> Record:
        """Write one event and wait until it is on disk; on a full disk, until there is room.

        Returns: the record as written: `seq`, `time` (unix seconds), `event`, `generation`,
        `message` and the given fields.
        Raises: OSError when the disk is sick, or full for ten minutes.
        """
        record: Record = {
            "seq": self._next_seq,
            "time": time.time(),
            "event": event,
            "generation": generation,
            "message": message,
            **fields,
        }
        line = json.dumps(record).encode() + b"\n"
        deadline_s = time.monotonic() + _ROOM_TIMEOUT_S
        while not self._has_written(line, is_last_try=time.monotonic() > deadline_s):
            time.sleep(_TRY_EVERY_S)
        self._next_seq += 1
        self.events.append(record)
        return record

    def _has_written(self, line: bytes, *, is_last_try: bool) -> bool:
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)  # half a line would spoil the next one
            if is_last_try or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return False
        return True

    def last(self, *events: str) -> Record | None:
        """Return the newest record whose event is one of `events`."""
        return next((r for r in reversed(self.events) if r["event"] in events), None)

    def close(self) -> None:
        """Close the file; the journal must not be used afterwards."""
        self._file.close()


def read_journal(path: Path) -> Iterator[Record]:
    """Yield the whole records of a journal in order; yield nothing where there is no file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)


def _cut_torn_tail(path: Path) -> None:
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)
            os.fsync(file.fileno())


def write_status(path: Path, status: Record) -> None:
    """Replace the status file in one step, so that a reader never sees half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(status))
    temporary.replace(path)


def read_status(path: Path) -> Record | None:
    """Return the newest status, or None while the job has not written one."""
    try:
        status: Record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return status
