"""Follow a run: its journal, its status and its ranks' logs as one stream of records.

A record is a dict with `type` and `time` (unix seconds):
- `event`: a line of the journal: `seq`, `event`, `generation`, `message`, and the event's fields;
- `progress`: a new status, with the fields of status.json;
- `log`: one line a rank wrote: `rank` (None for what has no rank) and `text`.

*poll* looks once and returns what is new; it never waits. A line without its end is left for
later, so that nobody sees half of one.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

Record = dict[str, Any]

POLL_S = 0.2
# One poll reads at most this much of a file, so that a huge log cannot hold up the events.
_MAX_READ_BYTES = 2**20
# A line longer than this is passed on in pieces: progress bars may never end a line.
_MAX_LINE_BYTES = 64 * 2**10
_RANK_LOG = re.compile(r"rank-(\d{1,6})\.log")
_RECORD_TYPES = frozenset({"event", "progress", "log"})


class LineReader:
    """Read the lines that are added to a file which may not exist yet, shrink or be replaced."""

    def __init__(self, path: Path, *, from_start: bool = True) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._inode = -1
        self._pending = b""
        self._skip_existing = not from_start

    def read(self) -> list[str]:
        """Return the whole lines that are new, without their ends; bad bytes become U+FFFD."""
        lines = self._drain() if self._file is not None else []
        if self._reopened():
            lines += self._drain()
        return lines

    def take_rest(self) -> list[str]:
        """Return the last line although it has no end; nothing more is coming."""
        rest, self._pending = self._pending, b""
        return [_text(rest)] if rest else []

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reopened(self) -> bool:
        """Open the file if it is new or another one than before; say whether that was so."""
        try:
            found = os.stat(self._path)
            if self._file is not None and found.st_ino == self._inode:
                return False
            file = open(self._path, "rb")  # noqa: SIM115 - kept open between polls
        except OSError:
            # Not there (yet, or any more); a later poll may find it.
            self._skip_existing = False
            return False
        self.close()
        self._file, self._inode, self._pending = file, os.fstat(file.fileno()).st_ino, b""
        if self._skip_existing:
            self._skip_existing = False
            file.seek(0, os.SEEK_END)
        return True

    def _drain(self) -> list[str]:
        assert self._file is not None, "there is a file to drain"
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            # Truncated: what is there now is new.
            self._file.seek(0)
            self._pending = b""
        self._pending += self._file.read(_MAX_READ_BYTES)
        *whole, self._pending = self._pending.split(b"\n")
        if len(self._pending) > _MAX_LINE_BYTES:
            whole.append(self._pending)
            self._pending = b""
        return [_text(line) for line in whole]


def _text(line: bytes) -> str:
    return line.rstrip(b"\r").decode("utf-8", "replace")


class RunFollower:
    """Follow a run folder that can be seen here.

    `from_start` False leaves out what is there already. `types` says which records are wanted;
    `ranks` whose logs (None = all).
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        from_start: bool = True,
        types: Collection[str] = _RECORD_TYPES,
        ranks: Collection[int] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._types = frozenset(types)
        self._ranks = ranks
        self._journal = LineReader(run_dir / "journal.jsonl", from_start=from_start)
        self._logs: dict[int, LineReader] = {}
        self._logs_from_start = from_start
        self._status_seen: tuple[int, int] | None = None
        if not from_start:
            self.poll()
            # Logs that appear from now on are new as a whole.
            self._logs_from_start = True

    def poll(self) -> list[Record]:
        """Return what is new: log lines first, then events, then the newest status."""
        records: list[Record] = []
        if "log" in self._types:
            records += self._poll_logs(LineReader.read)
        if "event" in self._types:
            records += [_event_of(line) for line in self._journal.read()]
        if "progress" in self._types:
            records += self._poll_status()
        return records

    def finish(self) -> list[Record]:
        """Return all that is left, unfinished last lines too; the run has ended."""
        records: list[Record] = []
        while found := self.poll():
            records += found
        if "log" in self._types:
            records += self._poll_logs(LineReader.take_rest)
        self.close()
        return records

    def close(self) -> None:
        """Close the files."""
        for reader in (self._journal, *self._logs.values()):
            reader.close()

    def _poll_logs(self, read: Callable[[LineReader], list[str]]) -> list[Record]:
        self._find_logs()
        now = time.time()
        return [
            {"type": "log", "time": now, "rank": rank, "text": line}
            for rank, reader in sorted(self._logs.items())
            for line in read(reader)
        ]

    def _find_logs(self) -> None:
        folder = self._run_dir / "logs"
        try:
            names = os.listdir(folder)
        except OSError:
            return  # the driver has not made it yet
        for name in names:
            match = _RANK_LOG.fullmatch(name)
            rank = int(match[1]) if match else -1
            if rank < 0 or rank in self._logs:
                continue
            if self._ranks is None or rank in self._ranks:
                self._logs[rank] = LineReader(folder / name, from_start=self._logs_from_start)

    def _poll_status(self) -> list[Record]:
        path = self._run_dir / "status.json"
        try:
            found = os.stat(path)
            seen = (found.st_ino, found.st_mtime_ns)
            if seen == self._status_seen:
                return []
            status = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return []  # not there yet; it is replaced whole, so the next poll sees all of it
        self._status_seen = seen
        if not isinstance(status, dict):
            return []
        return [{**status, "type": "progress", "time": status.get("updated_at") or time.time()}]


def _event_of(line: str) -> Record:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        return {"type": "log", "time": time.time(), "rank": None, "text": f"journal: {line}"}
    return {**event, "type": "event"}


class TextFollower:
    """Follow a submitted job through all that its driver has printed so far.

    `fetch` returns the whole text; each poll costs one such transfer, so a poll is put off until
    ten times what the last one took has passed.
    """

    def __init__(
        self,
        fetch: Callable[[], str],
        *,
        types: Collection[str] = _RECORD_TYPES,
        ranks: Collection[int] | None = None,
    ) -> None:
        self._fetch = fetch
        self._types = frozenset(types)
        self._ranks = ranks
        self._cursor = 0
        self._not_before_s = 0.0
        self.num_records = 0  # lines so far that were the driver's own records

    def poll(self) -> list[Record]:
        """Return what is new, or nothing when it is too soon to ask again."""
        if time.monotonic() < self._not_before_s:
            return []
        return self._look(whole_lines_only=True)

    def finish(self) -> list[Record]:
        """Return all that is left; the job has ended."""
        return self._look(whole_lines_only=False)

    def close(self) -> None:
        """Nothing is held open."""

    def _look(self, *, whole_lines_only: bool) -> list[Record]:
        start_s = time.monotonic()
        text = self._fetch()
        end_s = time.monotonic()
        self._not_before_s = end_s + max(1.0, 10.0 * (end_s - start_s))
        if len(text) < self._cursor:
            # Fewer than before: another text. Ray's log may be cut at a restart of its agent.
            self._cursor = 0
        end = text.rfind("\n", self._cursor) + 1 if whole_lines_only else len(text)
        if end <= self._cursor:
            return []
        lines = text[self._cursor : end].removesuffix("\n").split("\n")
        self._cursor = end
        records = []
        for line in lines:
            record = _own_record(line)
            self.num_records += record is not None
            if record is None or record["type"] == "error":
                text = record["message"] if record else line
                record = {"type": "log", "time": time.time(), "rank": None, "text": text}
            if self._is_wanted(record):
                records.append(record)
        return records

    def _is_wanted(self, record: Record) -> bool:
        if record["type"] not in self._types:
            return False
        return record["type"] != "log" or self._ranks is None or record.get("rank") in self._ranks


def _own_record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or "time" not in record:
        return None
    is_ours = record.get("type") in _RECORD_TYPES
    return record if is_ours or (record.get("type") == "error" and "message" in record) else None
