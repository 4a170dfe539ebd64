"""The ring and its reader: wrap-around, torn records, broken files, and readers beside writers."""

import dataclasses
import json
import os
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.comm import recorder_build
from gangline.comm import ring_format as fmt
from gangline.comm.events import Op, Ring, RingError, State, dtype_name, list_rings, open_rings
from gangline.comm.recorder_fallback import _RingWriter

INFO = fmt.RingInfo(
    pid=os.getpid(),
    start_ticks=fmt.start_ticks(os.getpid()),
    pid_namespace=fmt.pid_namespace(),
    host="here",
    label="w1",
    rank=5,
    group="0",
    group_desc="default_pg",
    ranks=(4, 5, 7),
    group_rank=1,
    group_size=3,
    backend="gloo",
    devices=("cpu",),
    recorder="python",
    recorder_reason="a test",
    torch="2.13",
    realtime_offset_ns=0,
)
HEADER_BYTES = 4096


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "1-1.ring"
    fmt.create_ring(path, INFO, capacity=8)
    return path


def write(path):
    return _RingWriter(path, INFO.ranks, 3, has_ends=True)


def put(path, number, word, value):
    """Overwrite one word of the record of an operation."""
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + (number - 1) % 8 * 64 + word * 8)
        file.write(struct.pack("<Q", value))


def test_an_event_says_all_that_was_recorded(path):
    writer = write(path)
    before_ns = time.monotonic_ns()
    writer.begin(Op.BROADCAST, 2, 640, 6)
    sent = writer.begin(Op.SEND, 0, 24, 15)
    writer.end(sent, fmt.DONE, fmt.END_AT_WAIT)
    ring = Ring.open(path)
    assert ring.info == INFO
    assert ring.progress == (2, 1, 2, 0)
    assert (ring.last_enqueued, ring.last_completed, ring.ends) == (2, 2, fmt.ENDS_STAMPED)
    first, second = ring.comm_events()
    assert (first.rank, first.group, first.group_desc) == (5, "0", "default_pg")
    assert (first.sequence, first.op, first.state) == (1, Op.BROADCAST, State.OPEN)
    assert (first.peer, first.num_bytes, first.dtype, first.match) == (7, 640, "float32", 1)
    assert (first.end_ns, first.duration_s) == (0, None)
    assert (second.op, second.state, second.peer, second.dtype) == (
        Op.SEND, State.DONE, 4, "bfloat16",
    )  # fmt: skip
    assert (second.match, second.is_end_at_wait) == (1, True)
    assert before_ns <= first.enqueue_ns <= second.enqueue_ns <= second.end_ns
    assert ring.open_events()["sequence"].tolist() == [1]
    assert ring.events(since=1)["sequence"].tolist() == [2]
    assert len(ring.events(since=2)) == 0
    writer.close()
    assert ring.progress.closed_ns > 0
    assert not path.exists()
    assert len(ring.comm_events()) == 2, "who has it open can still read it"


def test_the_newest_stay_when_the_ring_wraps(path):
    writer = write(path)
    numbers = [writer.begin(Op.SEND, 0, size, 6) for size in range(1, 31)]
    for number in numbers[:28]:
        writer.end(number, fmt.DONE)
    ring = Ring.open(path)
    assert ring.progress == (30, 28, 28, 0)
    events = ring.events()
    assert events["sequence"].tolist() == list(range(23, 31))
    assert events["num_bytes"].tolist() == list(range(23, 31))
    assert events["state"].tolist() == [State.DONE] * 6 + [State.OPEN] * 2
    assert ring.events(since=27)["sequence"].tolist() == [28, 29, 30]
    assert ring.events(since=2**63)["sequence"].tolist() == []


def test_the_end_of_an_overwritten_operation_is_counted_and_hurts_nobody(path):
    writer = write(path)
    old = writer.begin(Op.SEND, 0, 1, 6)
    for _ in range(8):
        writer.begin(Op.RECV, 0, 2, 6)
    writer.end(old, fmt.DONE)
    ring = Ring.open(path)
    assert ring.progress[:3] == (9, 1, 1)
    assert set(ring.events()["state"].tolist()) == {State.OPEN}


def test_only_the_first_end_counts(path):
    writer = write(path)
    number = writer.begin(Op.SEND, 0, 1, 6)
    writer.end(number, fmt.FAILED)
    writer.end(number, fmt.DONE)
    ring = Ring.open(path)
    assert ring.progress.num_ended == 1
    assert ring.comm_events()[0].state == State.FAILED


@pytest.mark.parametrize(
    ("stamp", "found"),
    [
        pytest.param(2 << 3 | fmt.WRITING, [1, 3], id="being written"),
        pytest.param(10 << 3 | fmt.OPEN, [1, 3], id="overwritten by a later lap"),
        pytest.param(10 << 3 | fmt.WRITING, [1, 3], id="being overwritten"),
        pytest.param(2 << 3 | 7, [1, 3], id="no phase"),
        pytest.param(0, [1, 3], id="claimed, not yet written"),
        pytest.param(2 << 3 | fmt.ENDING, [1, 2, 3], id="being ended"),
    ],
)
def test_a_record_in_the_making_is_not_returned(path, stamp, found):
    writer = write(path)
    for _ in range(3):
        writer.end(writer.begin(Op.SEND, 0, 1, 6), fmt.DONE)
    put(path, 2, 0, stamp)
    events = Ring.open(path).events()
    assert events["sequence"].tolist() == found
    for event in events:
        is_ending = event["sequence"] == 2
        assert event["state"] == (State.OPEN if is_ending else State.DONE)
        assert bool(event["end_ns"]) != is_ending


def test_a_record_that_changes_between_two_looks_is_not_mixed(path, monkeypatch):
    """The reader's two looks see: the old record, then one whose words are half the new one's."""
    writer = write(path)
    writer.end(writer.begin(Op.SEND, 0, 1111, 6), fmt.DONE)
    ring = Ring.open(path)
    whole = ring._records(1, 1)
    half = whole.copy()
    half["num_bytes"] = 2222
    ended_between = whole.copy()
    ended_between["stamp"] = 1 << 3 | fmt.OPEN
    ended_between["end_ns"] = 0
    looks: list = []
    monkeypatch.setattr(Ring, "_records", lambda self, first, count: looks.pop(0).copy())

    looks[:] = [half, whole] * 8  # torn at the earlier look: the later lap was half written
    assert len(ring.events()) == 0
    looks[:] = [whole, half] * 8
    assert len(ring.events()) == 0
    looks[:] = [half, whole, whole, whole]
    assert ring.events()["num_bytes"].tolist() == [1111]
    looks[:] = [ended_between, whole]
    (event,) = ring.comm_events()
    assert (event.state, event.end_ns) == (State.OPEN, 0), "as it was at the earlier look"


BROKEN = {
    "empty": lambda data: b"",
    "short header": lambda data: data[:40],
    "no ring": lambda data: b"\x7fELF" + data[4:],
    "another version": lambda data: data[:8] + struct.pack("<I", 2) + data[12:],
    "no records": lambda data: data[:20] + struct.pack("<I", 0) + data[24:],
    "too many records": lambda data: data[:20] + struct.pack("<I", 2**32 - 1) + data[24:],
    "header too big": lambda data: data[:12] + struct.pack("<I", 2**32 - 1) + data[16:],
    "cut short": lambda data: data[:-1],
    "longer": lambda data: data + b"\0" * 64,
    "meta too big": lambda data: data[:24] + struct.pack("<I", 2**31) + data[28:],
    "meta empty": lambda data: data[:24] + struct.pack("<I", 0) + data[28:],
    "meta not JSON": lambda data: data[:256] + b"\xff" * 64 + data[320:],
    "meta no object": lambda data: meta(data, []),
    "meta too deep": lambda data: meta(data, "[" * 100_000),
    "meta without a pid": lambda data: meta(data, {"rank": 1}),
    "meta with a wrong type": lambda data: meta(data, {**as_json(), "pid": "1"}),
    "meta with a wrong item": lambda data: meta(data, {**as_json(), "ranks": [1, "2"]}),
    "meta with more": lambda data: meta(data, {**as_json(), "more": 1}),
}


def as_json():
    return dataclasses.asdict(INFO)


def meta(data, value):
    text = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    header_bytes = -(-(256 + len(text)) // 4096) * 4096
    head = data[:12] + struct.pack("<4I", header_bytes, 64, 8, len(text)) + data[28:256]
    return (head + text).ljust(header_bytes, b"\0") + data[HEADER_BYTES:]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_clear_error(path, name):
    path.write_bytes(BROKEN[name](path.read_bytes()))
    num_fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RingError, match="is not a ring of communication records: ") as caught:
        Ring.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == num_fds


def test_the_whole_meta_is_accepted_by_the_same_helper(path):
    path.write_bytes(meta(path.read_bytes(), as_json()))
    assert Ring.open(path).info == INFO


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, path, kind):
    other = tmp_path / "other.ring"
    if kind == "folder":
        other.mkdir()
    elif kind == "pipe":
        os.mkfifo(other)
    else:
        other.symlink_to(path)
    with pytest.raises(RingError):
        Ring.open(other)


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error_and_no_crash(path):
    writer = write(path)
    writer.begin(Op.SEND, 0, 1, 6)
    ring = Ring.open(path)
    del writer
    os.truncate(path, 300)
    with pytest.raises(RingError, match="ends at"):
        ring.events()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_file_content_breaks_the_reader(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "1-1.ring"
    fmt.create_ring(path, INFO, capacity=4)
    writer = write(path)
    for _ in range(6):
        writer.end(writer.begin(Op.SEND, 0, 1, 6), fmt.DONE)
    content = bytearray(path.read_bytes())
    used = [*range(300), *range(HEADER_BYTES, len(content))]
    for place in data.draw(st.lists(st.sampled_from(used), max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        with Ring.open(path) as ring:
            for event in ring.comm_events():
                assert event.sequence > 0
                assert isinstance(event.op, Op)
                assert isinstance(event.state, State)
                assert dtype_name(3) == "int32"
    except RingError:
        pass


def test_a_ring_that_goes_while_a_folder_is_listed_is_passed_over(tmp_path, path):
    fmt.create_ring(tmp_path / "1-2.ring", INFO, capacity=8)
    (tmp_path / ".1-3.ring.77").write_text("being made")
    (tmp_path / "1-4.ring").write_text("broken")
    assert [found.name for found in list_rings(tmp_path)] == ["1-1.ring", "1-2.ring", "1-4.ring"]
    errors: list[RingError] = []
    seen = []
    for ring in open_rings(tmp_path, errors.append):
        seen.append(ring.path.name)
        (tmp_path / "1-2.ring").unlink(missing_ok=True)
    assert seen == ["1-1.ring"]
    assert [error.path.name for error in errors] == ["1-4.ring"]
    assert list(list_rings(tmp_path / "nothing")) == []


@pytest.mark.parametrize("capacity", [0, 1, 3, 1000, 1 << 23])
def test_a_capacity_that_no_ring_can_have_is_refused(tmp_path, capacity):
    with pytest.raises(ValueError, match="capacity is"):
        fmt.create_ring(tmp_path / "x.ring", INFO, capacity)


def test_two_makers_of_one_name_do_not_share_a_ring(tmp_path, path):
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        fmt.create_ring(path, INFO, capacity=16)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_reader_needs_no_torch():
    code = "import sys, gangline.comm.events, gangline.comm.ring_folders; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "gangline.comm.events" in loaded
    assert not {"torch", "ray", "pydantic"} & set(loaded)


STRESS = r"""
#include <cstdlib>
#include <thread>
#include <vector>
#include "recorder_ring.hpp"

// Write operation n as bytes n, match 7 n, start 5 n, end 3 n, as fast as it goes.
int main(int, char** arguments) {
  std::string error;
  auto ring = gangline::Ring::open(arguments[1], error);
  if (ring == nullptr) return 1;
  std::atomic<uint64_t> numbers{0};
  uint64_t until_ns = gangline::now_ns() + std::strtoull(arguments[2], nullptr, 10) * 1000000;
  auto write = [&] {
    while (gangline::now_ns() < until_ns) {
      uint64_t n = ++numbers;
      uint64_t number = ring->begin({12, 6, static_cast<int32_t>(n & 0xffff), n, 7 * n});
      ring->end(number, gangline::kDone, 0, -1, 3 * n, 5 * n);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(write);
  for (auto& thread : threads) thread.join();
}
"""


@pytest.fixture(scope="module")
def stress(tmp_path_factory):
    """A program that writes a ring as fast as the recorder's own code can."""
    compiler = recorder_build._find_compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("stress")
    (folder / "stress.cpp").write_text(STRESS)
    command = [compiler, "-std=c++20", "-O1", "-pthread", "-I", str(recorder_build.SOURCE.parent)]
    command += [str(folder / "stress.cpp"), "-o", str(folder / "stress")]
    subprocess.run(command, check=True)
    return folder / "stress"


def count_torn(records):
    n = records["num_bytes"]
    is_whole = (records["match"] == 7 * n) & (records["peer"] == (n & 0xFFFF).astype(np.int32))
    has_ended = records["end_ns"] != 0
    is_whole &= ~has_ended | ((records["end_ns"] == 3 * n) & (records["start_ns"] == 5 * n))
    return int((~is_whole).sum())


@pytest.mark.parametrize("capacity", [2, 64])
def test_readers_beside_the_recorder_never_see_half_a_record(tmp_path, stress, capacity):
    path = tmp_path / "1-1.ring"
    fmt.create_ring(path, INFO, capacity)
    writer = subprocess.Popen([stress, path, "2000"])
    num_read = num_torn = num_torn_at_one_look = 0
    with Ring.open(path) as ring:
        while writer.poll() is None:
            events = ring.events()
            assert (np.diff(events["sequence"].astype(np.int64)) > 0).all()
            num_read += len(events)
            num_torn += count_torn(events)
            # What the reader would return if it trusted a single look; a few in ten million.
            look = ring._records(1, capacity)
            phase = look["stamp"] & 7
            num_torn_at_one_look += count_torn(look[(phase != fmt.WRITING) & (phase != fmt.ENDING)])
        assert writer.returncode == 0
        num_written = ring.last_enqueued
        assert ring.progress.num_ended == num_written
    print(f"{num_written} written, {num_read} read, {num_torn_at_one_look} torn at one look")
    assert num_written > 10_000
    assert num_read > 100
    assert num_torn == 0


def test_readers_beside_the_fallback_never_see_half_a_record(path):
    writer = write(path)
    stop = threading.Event()

    def communicate():
        size = 0
        while not stop.is_set():
            size += 1
            number = writer.begin(Op.SEND, 0, size, 6 if size % 4 == 0 else 0)
            writer.end(number, fmt.DONE)

    threads = [threading.Thread(target=communicate) for _ in range(3)]
    for thread in threads:
        thread.start()
    num_read = 0
    with Ring.open(path) as ring:
        end_s = time.monotonic() + 1.0
        while time.monotonic() < end_s:
            events = ring.events()
            num_read += len(events)
            assert ((events["dtype"] == 6) == (events["num_bytes"] % 4 == 0)).all()
            has_ended = events["state"] == State.DONE
            assert (events["end_ns"] >= events["enqueue_ns"])[has_ended].all()
            assert (np.diff(events["sequence"].astype(np.int64)) > 0).all()
        stop.set()
        for thread in threads:
            thread.join()
        assert ring.last_enqueued > 1000
    assert num_read > 100
