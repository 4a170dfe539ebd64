from __future__ import annotations

import errno
import itertools
import json
import os
import random
from pathlib import Path

import pytest

from gangline.monitoring.spool import MAX_UNWRITTEN_BYTES, SpoolLockedError, SpoolWriter
from gangline.monitoring.spool_cursor import Cursor, Position
from gangline.monitoring.spool_reader import (
    SpoolReader,
    decode_line,
    encode_line,
    last_sequence,
    newest_summary,
    segment_numbers,
    segment_path,
)


def read_all(root: Path, **options) -> list[dict]:
    records = SpoolReader(root, **options).records()
    return [record for record in records if record["type"] != "state"]


def numbers(root: Path, **options) -> list[int]:
    return [record["n"] for record in read_all(root, **options) if record["type"] == "x"]


def x(n: int, size: int = 0) -> dict:
    return {"type": "x", "n": n, "fill": "y" * size}


def test_what_is_appended_is_read_in_order_over_segments(tmp_path):
    writer = SpoolWriter(tmp_path, segment_bytes=500)
    for n in range(0, 60, 3):
        assert writer.append([x(n), x(n + 1), x(n + 2)])
    assert len(segment_numbers(tmp_path)) > 3
    assert numbers(tmp_path) == list(range(60))
    assert last_sequence(tmp_path) == 60


def test_reader_goes_on_from_any_position(tmp_path):
    writer = SpoolWriter(tmp_path, segment_bytes=400)
    for n in range(30):
        writer.append([x(n)])
    reader, seen, position = SpoolReader(tmp_path), [], Position()
    while entries := reader.read(position, max_bytes=1):
        seen += [entry.record for entry in entries]
        position = entries[-1].after
    assert [r["n"] for r in seen if r["type"] == "x"] == list(range(30))
    assert reader.read(position) == []
    writer.append([x(30)])
    assert [e.record["n"] for e in reader.read(position) if e.record["type"] == "x"] == [30]


def test_next_writer_goes_on_and_two_at_once_are_refused(tmp_path):
    writer = SpoolWriter(tmp_path)
    writer.append([x(0)])
    with pytest.raises(SpoolLockedError, match="one controller"):
        SpoolWriter(tmp_path)
    writer.close()
    again = SpoolWriter(tmp_path)
    again.append([x(1)])
    assert numbers(tmp_path) == [0, 1]
    assert last_sequence(tmp_path) == 2


def test_torn_tail_at_every_byte_is_dropped_and_the_next_writer_goes_on(tmp_path):
    whole = tmp_path / "whole"
    writer = SpoolWriter(whole)
    for n in range(3):
        writer.append([x(n)])
    writer.close()
    data = segment_path(whole, 1).read_bytes()
    last_line = data.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(last_line, len(data)):
        root = tmp_path / str(cut)
        root.mkdir()
        segment_path(root, 1).write_bytes(data[:cut])
        assert numbers(root) == [0, 1]
        events: list[str] = []
        after = SpoolWriter(root)
        after.append([x(7)])
        after.close()
        assert numbers(root, on_event=events.append) == [0, 1, 7]
        # Nothing is torn when the cut is at the end of a line.
        assert len(events) == (cut > last_line)


def test_every_flipped_bit_is_detected(tmp_path):
    writer = SpoolWriter(tmp_path)
    for n in range(3):
        writer.append([x(n)])
    writer.close()
    path = segment_path(tmp_path, 1)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    second_start = len(lines[0]) + len(lines[1])
    second = range(second_start, second_start + len(lines[2]) - 1)
    segment_path(tmp_path, 2).write_bytes(encode_line(9, x(9)))
    for offset in second:
        for bit in range(8):
            damaged = bytearray(data)
            damaged[offset] ^= 1 << bit
            path.write_bytes(damaged)
            # A flip into a newline splits the line in two torn ones: the others stay.
            assert numbers(tmp_path, on_event=lambda _: None) == [0, 2, 9], (offset, bit)


def test_reader_waits_for_the_end_of_a_line_in_the_open_segment(tmp_path):
    line = encode_line(1, x(1))
    path = segment_path(tmp_path, 1)
    events: list[str] = []
    reader = SpoolReader(tmp_path, on_event=events.append)
    for cut in range(len(line)):
        path.write_bytes(line[:cut])
        assert reader.read(Position()) == []
    path.write_bytes(line)
    assert [e.record["n"] for e in reader.read(Position())] == [1]
    assert events == []


def test_cap_drops_the_new_reports_it_and_marks_the_gap(tmp_path, events):
    seen, on_event = events
    writer = SpoolWriter(tmp_path, cap_bytes=16_000, on_event=on_event)
    results = [writer.append([x(n, 300)]) for n in range(100)]
    num_kept = results.index(False)
    assert 20 < num_kept < 60
    assert not any(results[num_kept:])
    assert writer.num_dropped == 100 - num_kept
    assert sum(p.stat().st_size for p in tmp_path.glob("segment-*")) <= 16_000
    assert "spool_cap_bytes" in seen[0]
    assert len(seen) < 10
    assert writer.append([{"type": "end"}], essential=True), "the reserve is for such records"
    kept = read_all(tmp_path)
    assert [r["n"] for r in kept if r["type"] == "x"] == list(range(num_kept))
    assert [r["type"] for r in kept[-2:]] == ["gap", "end"]
    assert kept[-2]["num_records"] == 100 - num_kept


def test_delivered_segments_make_room_and_undelivered_ones_do_not(tmp_path):
    writer = SpoolWriter(tmp_path, cap_bytes=16_000, on_event=lambda _: None)
    for n in range(30):
        assert writer.append([x(n, 300)])
    cursor = Cursor.load(tmp_path, "http://host:1")
    entries = SpoolReader(tmp_path).read(Position(), max_bytes=10**6)
    while more := SpoolReader(tmp_path).read(entries[-1].after):
        entries += more
    cursor.position = next(e.after for e in entries if e.seq == 20)
    cursor.save("http://host:1")
    for n in range(30, 45):
        assert writer.append([x(n, 300)])
    left = numbers(tmp_path)
    assert left[0] > 0, "something was deleted"
    assert left[0] <= 20, "nothing undelivered was deleted"
    assert left == list(range(left[0], 45))
    assert writer.num_dropped == 0


class SickDisk:
    """Fails the n-th write, fsync or creation of a file, for `length` operations."""

    def __init__(self, monkeypatch, first: int, length: int, partial: int = 0) -> None:
        self.count = self.num_failed = 0
        self.first, self.length, self.partial = first, length, partial
        self.real_write, real_fsync, real_open = os.write, os.fsync, os.open

        def write(descriptor: int, data: bytes) -> int:
            if self.fails():
                if self.partial:
                    self.real_write(descriptor, bytes(data[: self.partial]))
                raise OSError(errno.ENOSPC, "No space left on device")
            # Short writes are legal: give one for each long piece.
            return self.real_write(descriptor, data[: len(data) // 2] if len(data) > 70 else data)

        def fsync(descriptor: int) -> None:
            if self.fails():
                raise OSError(errno.EIO, "Input/output error")
            real_fsync(descriptor)

        def open_(path, flags, *rest, **options) -> int:
            if flags & os.O_CREAT and self.fails():
                raise OSError(errno.EROFS, "Read-only file system")
            return real_open(path, flags, *rest, **options)

        monkeypatch.setattr("gangline.monitoring.spool.os.write", write)
        monkeypatch.setattr("gangline.monitoring.spool.os.fsync", fsync)
        monkeypatch.setattr("gangline.monitoring.spool.os.open", open_)

    def fails(self) -> bool:
        self.count += 1
        failed = self.first <= self.count < self.first + self.length
        self.num_failed += failed
        return failed


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("partial", [0, 40])
def test_no_record_is_lost_when_any_operation_of_the_disk_fails(tmp_path, length, partial):
    # The n-th operation fails, for every n of the run: nothing is lost, doubled or raised.
    for first in itertools.count(1, 1 if length == 1 else 5):
        root = tmp_path / str(first)
        events: list[str] = []
        writer = SpoolWriter(root, segment_bytes=300, on_event=events.append)
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = SickDisk(monkeypatch, first, length, partial)
            results = [writer.append([x(n, 20)]) for n in range(8)]
            writer.close()
        assert (not all(results)) == (disk.num_failed > 0)
        assert bool(events) == (disk.num_failed > 0)
        left = numbers(root, on_event=lambda _: None)
        if writer.num_dropped == 0:
            assert left == list(range(8)), f"operation {first} failed"
        else:
            assert disk.first + disk.length > disk.count, "the disk was not well before the end"
            # Written but not fsynced counts as dropped, and may be there nevertheless.
            assert left == list(range(len(left)))
            assert len(left) >= 8 - writer.num_dropped
        if disk.num_failed == 0:
            break
    assert first > 20, "that many operations were made to fail, one after the other"


def test_memory_is_bounded_while_the_disk_is_full(tmp_path, monkeypatch, events):
    seen, on_event = events
    writer = SpoolWriter(tmp_path, on_event=on_event)
    SickDisk(monkeypatch, 1, 10**9)
    for n in range(60):
        assert not writer.append([x(n, 100_000)])
    assert writer.num_dropped == 60 - MAX_UNWRITTEN_BYTES // 100_041
    assert any("No space left" in e or "Read-only" in e for e in seen)
    assert len(seen) < 15
    assert len(segment_numbers(tmp_path)) <= 1, "no litter of empty segments"


def test_summary_stands_at_the_head_of_each_segment(tmp_path):
    total = 0
    writer = SpoolWriter(tmp_path, segment_bytes=300, summarise=lambda: {"total": total})
    for n in range(20):
        writer.append([x(n)])
        total += 1
    position = newest_summary(tmp_path)
    assert position.segment == segment_numbers(tmp_path)[-1]
    records = list(SpoolReader(tmp_path).records(position))
    assert records[0]["type"] == "state"
    assert records[0]["total"] + len(records) - 1 == 20


def test_lines_are_plain_json_behind_two_fields():
    line = encode_line(12, {"type": "x", "v": "ü\n"})
    assert line.count(b"\n") == 1
    assert json.loads(line.split(b" ", 2)[2]) == {"type": "x", "v": "ü\n"}
    assert decode_line(line[:-1]) == (12, {"type": "x", "v": "ü\n"})
    rng = random.Random(0)
    for _ in range(300):
        assert decode_line(rng.randbytes(rng.randrange(60))) is None
