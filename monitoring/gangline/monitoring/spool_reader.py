"""Read a spool: its lines, its segments, and what stands behind a position.

See `gangline.monitoring.spool` for the folder and the writer.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gangline.monitoring.spool_cursor import Position

Record = dict[str, Any]
OnEvent = Callable[[str], None]
START = Position()


def warn(message: str) -> None:
    """Report an event where no other place for it was given."""
    logging.getLogger("gangline.monitoring").warning("%s", message)


@dataclass(frozen=True)
class Entry:
    """One record read back, and the position after it."""

    seq: int
    record: Record
    after: Position


def encode_line(seq: int, record: Record) -> bytes:
    """Return the line of `record`: checksum, sequence number, JSON, newline."""
    body = b"%d %s" % (seq, json.dumps(record, separators=(",", ":")).encode())
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode_line(line: bytes) -> tuple[int, Record] | None:
    """Return sequence number and record of a line without its newline, or None if it is damaged."""
    try:
        checksum, body = line.split(b" ", 1)
        if checksum != b"%08x" % zlib.crc32(body):
            return None
        seq, text = body.split(b" ", 1)
        record = json.loads(text)
        return (int(seq), record) if isinstance(record, dict) else None
    except ValueError:
        return None


def segment_path(root: Path, number: int) -> Path:
    """Return the path of segment `number`."""
    return root / f"segment-{number:08d}.jsonl"


def segment_numbers(root: Path) -> list[int]:
    """Return the numbers of the segments in the folder, ascending."""
    names = (path.name for path in root.glob("segment-*.jsonl"))
    return sorted(int(name[8:-6]) for name in names if name[8:-6].isdigit())


class SpoolReader:
    """Read records behind the writer, from any position, in another process if wanted.

    Guarantees: records come in sequence order, each once; a damaged or torn line is skipped and
    reported, never returned and never an exception.
    """

    def __init__(self, root: Path, *, on_event: OnEvent = warn) -> None:
        self.root = root
        self._on_event = on_event
        self._reported = (0, -1)

    def read(self, position: Position, *, max_bytes: int = 2**20) -> list[Entry]:
        """Return the records behind `position`, about `max_bytes` of them; empty when none is new.

        A record larger than `max_bytes` is read whole.
        """
        while True:
            later = [n for n in segment_numbers(self.root) if n >= position.segment]
            if not later:
                return []
            if later[0] != position.segment:
                position = Position(later[0], 0, position.seq)
            # Looked up before the read: a segment that is sealed now cannot grow afterwards.
            sealed = len(later) > 1
            try:
                entries = self._read_segment(position, max_bytes, sealed)
            except FileNotFoundError:
                continue  # deleted by the writer since we listed it: it had been delivered
            if entries or not sealed:
                return entries
            position = Position(later[1], 0, position.seq)

    def _read_segment(self, position: Position, max_bytes: int, sealed: bool) -> list[Entry]:
        """Return entries of one segment; none only when it holds no further ones."""
        path = segment_path(self.root, position.segment)
        seq, offset = position.seq, position.offset
        entries: list[Entry] = []
        with path.open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(offset)
            while not entries or offset - position.offset < max_bytes:
                line = file.readline()
                if not line:
                    break
                decoded = decode_line(line[:-1]) if line.endswith(b"\n") else None
                if decoded is None and not sealed and offset + len(line) >= size_bytes:
                    break  # the writer may be in the middle of it
                offset += len(line)
                if decoded is None:
                    self._report_torn(position.segment, offset, len(line))
                elif decoded[0] > seq or decoded[1].get("type") == "state":
                    seq = max(seq, decoded[0])
                    entries.append(Entry(seq, decoded[1], Position(position.segment, offset, seq)))
        return entries

    def _report_torn(self, number: int, end: int, num_bytes: int) -> None:
        # Once each, though a segment's end may be looked at again and again.
        if (number, end) > self._reported:
            self._reported = (number, end)
            name = segment_path(self.root, number).name
            self._on_event(f"{name}: dropped a torn line of {num_bytes} bytes")

    def records(self, position: Position = START) -> Iterator[Record]:
        """Yield every record behind `position` that the folder holds now."""
        while entries := self.read(position):
            for entry in entries:
                yield entry.record
            position = entries[-1].after


def newest_summary(root: Path) -> Position:
    """Return the position of the newest `state` record: what stands from there on is the whole."""
    for number in reversed(segment_numbers(root)):
        with segment_path(root, number).open("rb") as file:
            line = file.readline()
        decoded = decode_line(line[:-1]) if line.endswith(b"\n") else None
        if decoded is not None and decoded[1].get("type") == "state":
            return Position(number)
    return START


def last_sequence(root: Path) -> int:
    """Return the newest sequence number that stands complete in the folder; 0 if none."""
    for number in reversed(segment_numbers(root)):
        seq = _last_sequence_of(segment_path(root, number))
        if seq is not None:
            return seq
    return 0


def _last_sequence_of(path: Path) -> int | None:
    """Return the number of the last complete line, reading the file from its end."""
    span = 2**16
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while True:
            start = max(size - span, 0)
            file.seek(start)
            lines = file.read(size - start).split(b"\n")[:-1]
            for line in reversed(lines if start == 0 else lines[1:]):
                decoded = decode_line(line)
                if decoded is not None:
                    return decoded[0]
            if start == 0:
                return None
            span *= 4
