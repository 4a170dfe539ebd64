"""What a rank says to others: `CommEvent`, and the reader of the rings in which they stand.

One *ring* per process group and backend of a process: a file in shared memory that the rank writes
with plain stores (format: ring_format.py) and any process of the machine reads, so the last
`capacity` operations stay readable while the rank is stopped, holds the GIL, or is dead.

    for ring in open_rings(ring_folder(run_dir)):
        with ring:
            print(ring.info.rank, ring.info.group_desc, ring.progress, ring.open_events())

Torch-free and light: an agent imports this and numpy. It reads by `pread`, not by a mapping,
because a file that somebody cuts short would kill a reader that has it mapped.
"""

import enum
import os
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from gangline.comm import ring_format as fmt
from gangline.comm.ring_format import RECORD, RingError, RingInfo

__all__ = [
    "CommEvent",
    "Op",
    "Progress",
    "Ring",
    "RingError",
    "RingInfo",
    "State",
    "list_rings",
    "open_rings",
]

EVENT = np.dtype(
    [
        ("sequence", "<u8"),
        ("op", "u1"),
        ("state", "u1"),
        ("flags", "u1"),
        ("dtype", "i1"),
        ("peer", "<i4"),
        ("num_bytes", "<u8"),
        ("match", "<u8"),
        ("enqueue_ns", "<u8"),
        ("start_ns", "<u8"),
        ("end_ns", "<u8"),
    ]
)
Events = NDArray[np.void]  # of dtype EVENT

_FIXED_AT_ENQUEUE = ("enqueue_ns", "num_bytes", "match", "op", "dtype")
_SET_AT_END = ("end_ns", "start_ns", "peer", "flags")
# How often a record is read again before it counts as being written for good (by a dead rank).
_NUM_READS = 8

# c10::ScalarType by number, without the quantized and other rare ones.
_DTYPES = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32",
    7: "float64", 8: "complex32", 9: "complex64", 10: "complex128", 11: "bool", 15: "bfloat16",
    23: "float8_e5m2", 24: "float8_e4m3fn", 25: "float8_e5m2fnuz", 26: "float8_e4m3fnuz",
    27: "uint16", 28: "uint32", 29: "uint64",
}  # fmt: skip


class Op(enum.IntEnum):
    """What was called: c10d::OpType by number, and one of ours."""

    BROADCAST = 0
    ALL_REDUCE = 1
    ALL_REDUCE_COALESCED = 2
    REDUCE = 3
    ALL_GATHER = 4
    ALL_GATHER_SINGLE = 5  # into one tensor
    ALL_GATHER_COALESCED = 6
    GATHER = 7
    SCATTER = 8
    REDUCE_SCATTER = 9
    ALL_TO_ALL_SINGLE = 10
    ALL_TO_ALL = 11
    SEND = 12
    RECV = 13
    RECV_ANY_SOURCE = 14
    BARRIER = 15
    REDUCE_SCATTER_SINGLE = 16
    COALESCED = 17  # a group of operations that were started as one
    ALL_REDUCE_SPARSE = 18
    REDUCE_SCATTER_COALESCED = 19
    MONITORED_BARRIER = 64
    UNKNOWN = 100

    @classmethod
    def _missing_(cls, value: object) -> "Op":
        return cls.UNKNOWN


class State(enum.IntEnum):
    """Where an operation is."""

    OPEN = fmt.OPEN  # enqueued, not ended
    DONE = fmt.DONE
    FAILED = fmt.FAILED  # it raised
    DROPPED = fmt.DROPPED  # nobody waited for it, and nobody can any more: its end is not known


@dataclass(frozen=True)
class CommEvent:
    """One operation of one rank; docs/recorder.md says what counts as its bytes and its peer."""

    rank: int  # global
    group: str
    group_desc: str
    sequence: int  # number of the operation in its ring, from 1
    op: Op
    state: State
    peer: int  # global rank of the other end, or of the root of a rooted operation; else -1
    num_bytes: int
    dtype: str  # of the first tensor; "" where there is none
    match: int  # the same on all ranks that meet in this operation; 0: not known
    enqueue_ns: int
    start_ns: int  # 0: not known
    end_ns: int  # 0: not ended
    is_end_at_wait: bool  # the end is when a wait returned: at or after the true end

    @property
    def duration_s(self) -> float | None:
        """Return the seconds from the enqueue to the end; None while there is no end."""
        return (self.end_ns - self.enqueue_ns) / 1e9 if self.end_ns else None


class Progress(NamedTuple):
    """A ring's counters."""

    last_enqueued: int  # number of the newest operation; 0: none yet
    num_ended: int
    last_completed: int  # highest number that has ended; older ones may be open still
    closed_ns: int  # when the group was given up; 0: in use


class Ring:
    """Read one ring; never waits for its writer, whatever state that is in."""

    def __init__(self, path: Path, fd: int) -> None:
        """Take over `fd`; use `Ring.open`."""
        self.path = path
        self._fd = fd
        size = os.fstat(fd).st_size
        header = fmt.HEADER.unpack(self._pread(0, fmt.HEADER.size))
        magic, version, header_bytes, record_bytes, capacity, meta_bytes, _, created_ns, _ = header
        if magic != fmt.MAGIC:
            raise RingError(path, f"it begins with {magic!r}")
        if version != fmt.VERSION:
            raise RingError(path, f"format version {version}; this reads version {fmt.VERSION}")
        is_whole = (
            record_bytes == fmt.RECORD_BYTES
            and 2 <= capacity <= fmt.MAX_CAPACITY
            and 0 < meta_bytes <= min(fmt.MAX_META_BYTES, header_bytes - fmt.META_OFFSET)
            and size == header_bytes + capacity * record_bytes
        )
        if not is_whole:
            sizes = f"{header_bytes} + {capacity} x {record_bytes}, with {meta_bytes} of meta"
            raise RingError(path, f"it has {size} bytes, and its header speaks of {sizes}")
        self.capacity: int = capacity
        self.created_ns: int = created_ns
        self._header_bytes: int = header_bytes
        try:
            self.info = RingInfo.parse(self._pread(fmt.META_OFFSET, meta_bytes))
        except (ValueError, RecursionError) as error:
            raise RingError(path, str(error)) from error

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a ring for reading.

        Raises: RingError; FileNotFoundError when it is gone, as a ring may be at any time.
        """
        path = Path(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RingError(path, str(error.strerror)) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise RingError(path, "not a regular file")
            return cls(path, fd)
        except BaseException:
            os.close(fd)
            raise

    @property
    def progress(self) -> Progress:
        """Read the counters; the cheapest question, a few microseconds."""
        counters = self._pread(fmt.COUNTERS_OFFSET, fmt.COUNTERS.size)
        closed_ns, num_enqueued, num_ended, last_ended = fmt.COUNTERS.unpack(counters)
        return Progress(num_enqueued, num_ended, last_ended, closed_ns)

    @property
    def last_enqueued(self) -> int:
        """The number of the newest operation; 0: none yet."""
        return self.progress.last_enqueued

    @property
    def last_completed(self) -> int:
        """The highest number of an operation that has ended."""
        return self.progress.last_completed

    @property
    def ends(self) -> int:
        """How ends are known here: fmt.ENDS_STAMPED, ENDS_BY_HOOK (NCCL), or ENDS_UNKNOWN."""
        return int(struct.unpack("<I", self._pread(fmt.ENDS_OFFSET, 4))[0])

    def events(self, since: int = 0) -> Events:
        """Return the operations after number `since` that are still in the ring, oldest first.

        Left out is what is being written or overwritten at this moment.

        Shapes: [n] of dtype EVENT.
        """
        newest = self.last_enqueued
        first = max(since + 1, newest - self.capacity + 1, 1)
        events = np.zeros(min(max(newest - first + 1, 0), self.capacity), EVENT)
        missing = np.arange(len(events))
        for _ in range(_NUM_READS):
            if not len(missing):
                break
            low, high = int(missing[0]), int(missing[-1]) + 1
            self._read_into(events[low:high], first + low)
            missing = np.flatnonzero(events["sequence"] == 0)
        found: Events = events[events["sequence"] > 0]
        return found

    def open_events(self) -> Events:
        """Return those that were enqueued and have not ended, as far as the ring reaches back."""
        events = self.events()
        found: Events = events[events["state"] == State.OPEN]
        return found

    def comm_events(self, since: int = 0) -> list[CommEvent]:
        """Return what `events` does, as objects."""
        return [self.to_comm_event(row) for row in self.events(since)]

    def to_comm_event(self, row: Any) -> CommEvent:
        """Return one row of `events` as an object."""
        return CommEvent(
            rank=self.info.rank,
            group=self.info.group,
            group_desc=self.info.group_desc,
            sequence=int(row["sequence"]),
            op=Op(int(row["op"])),
            state=State(int(row["state"])),
            peer=int(row["peer"]),
            num_bytes=int(row["num_bytes"]),
            dtype=dtype_name(int(row["dtype"])),
            match=int(row["match"]),
            enqueue_ns=int(row["enqueue_ns"]),
            start_ns=int(row["start_ns"]),
            end_ns=int(row["end_ns"]),
            is_end_at_wait=bool(row["flags"] & fmt.END_AT_WAIT),
        )

    def writer_is_alive(self) -> bool | None:
        """Return whether the process still exists (stopped counts); None: not visible from here."""
        if self.info.pid_namespace != fmt.pid_namespace():
            return None
        return fmt.start_ticks(self.info.pid) == self.info.start_ticks

    def close(self) -> None:
        """Give up the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_into(self, rows: Events, first: int) -> None:
        """Fill in those of the rows, from operation `first` on, that can be read now."""
        earlier = self._records(first, len(rows))
        later = self._records(first, len(rows))
        numbers = np.arange(first, first + len(rows), dtype=np.uint64)
        phase = earlier["stamp"] & 7
        good = (earlier["stamp"] >> 3 == numbers) & (later["stamp"] >> 3 == numbers)
        good &= (phase >= fmt.OPEN) & (phase <= fmt.DROPPED)
        has_ended = phase >= fmt.DONE
        for name in _FIXED_AT_ENQUEUE:
            good &= earlier[name] == later[name]
        for name in _SET_AT_END:
            good &= ~has_ended | (earlier[name] == later[name])
        rows["sequence"][good] = numbers[good]
        rows["state"][good] = np.where(has_ended, phase, fmt.OPEN)[good]
        for name in (*_FIXED_AT_ENQUEUE, *_SET_AT_END):
            rows[name][good] = later[name][good]
        is_open = good & ~has_ended  # at the earlier read; what the later shows may be half an end
        rows["end_ns"][is_open] = 0
        rows["start_ns"][is_open] = 0

    def _records(self, first: int, count: int) -> NDArray[np.void]:
        place = (first - 1) % self.capacity
        num_before_wrap = min(count, self.capacity - place)
        offset = self._header_bytes + place * fmt.RECORD_BYTES
        data = self._pread(offset, num_before_wrap * fmt.RECORD_BYTES)
        data += self._pread(self._header_bytes, (count - num_before_wrap) * fmt.RECORD_BYTES)
        return np.frombuffer(data, RECORD)

    def _pread(self, offset: int, num_bytes: int) -> bytes:
        data = os.pread(self._fd, num_bytes, offset)
        if len(data) != num_bytes:
            raise RingError(self.path, f"it ends at {offset + len(data)}, in the middle")
        return data


def dtype_name(code: int) -> str:
    """Return torch's name of an element type by its number; "" for none."""
    return "" if code < 0 else _DTYPES.get(code, f"type {code}")


def open_rings(
    folder: str | Path, report: Callable[[RingError], None] | None = None
) -> Iterator[Ring]:
    """Open the rings of a run's folder one by one; the caller closes them.

    One that goes meanwhile, with its group, is passed over; so is one that is broken, if `report`
    takes the error. Raises: RingError without a `report`.
    """
    for path in list_rings(folder):
        try:
            yield Ring.open(path)
        except FileNotFoundError:
            continue
        except RingError as error:
            if report is None:
                raise
            report(error)


def list_rings(folder: str | Path) -> Iterator[Path]:
    """Yield the rings of a run's folder (`ring_folders.ring_folder`), of dead processes too."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    for name in names:
        if name.endswith(fmt.RING_SUFFIX) and not name.startswith("."):
            yield Path(folder, name)
