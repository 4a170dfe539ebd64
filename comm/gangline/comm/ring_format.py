"""The file behind a ring of communication records; events.py reads it, the recorders write it.

offset  0  magic "GANGRING", u32 version, header_bytes, record_bytes, capacity, meta_bytes, ends
       32  u64 created_ns, closed_ns (0: in use)
       64  u64 num_enqueued                the number of the newest operation
      128  u64 num_ended, last_ended       how many have ended; the highest number among them
      256  meta: JSON, see `RingInfo`
header_bytes  `capacity` records of 64 bytes; operation s, from 1, in place (s - 1) mod capacity

Numbers are little-endian, times CLOCK_MONOTONIC in ns. The first word of a record, its stamp, is
`s << 3 | phase`. A writer sets WRITING before it touches the other words and OPEN after them,
ENDING before and an ended phase after the words that an end changes. So two reads that agree in
those words, the second begun when the first was over, with the same s in both stamps, show the
record of s. recorder_ring.hpp has the same layout for C++.

Torch-free, as is all that an agent needs to read rings.
"""

import json
import os
import secrets
import struct
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np

MAGIC = b"GANGRING"
VERSION = 1
RECORD_BYTES = 64
DEFAULT_CAPACITY = 4096
MAX_CAPACITY = 1 << 22
MAX_META_BYTES = 1 << 24
RING_SUFFIX = ".ring"

HEADER = struct.Struct("<8s6I2Q")
COUNTERS = struct.Struct("<Q16xQ56x2Q")  # closed_ns, num_enqueued, num_ended, last_ended
COUNTERS_OFFSET = 40
ENDS_OFFSET = 28
META_OFFSET = 256
_PAGE_BYTES = 4096

# Phases of a record.
WRITING, OPEN, ENDING, DONE, FAILED, DROPPED = 1, 2, 3, 4, 5, 6

# Flags of a record.
END_AT_WAIT = 1  # the end is when a wait returned, which may be after the operation was complete
IN_COALESCED = 2  # issued inside a coalesced group; its end is the end of the group

# How the ends in a ring are known: never, stamped as they happen, from NCCL's completion hook.
ENDS_UNKNOWN, ENDS_STAMPED, ENDS_BY_HOOK = 0, 1, 2

RECORD = np.dtype(
    [
        ("stamp", "<u8"),
        ("enqueue_ns", "<u8"),
        ("end_ns", "<u8"),
        ("start_ns", "<u8"),
        ("num_bytes", "<u8"),
        ("match", "<u8"),
        ("peer", "<i4"),
        ("op", "u1"),
        ("dtype", "i1"),
        ("flags", "u1"),
        ("unused", "u1"),
        ("reserved", "<u8"),
    ]
)


class RingError(Exception):
    """A file is not a ring, or no longer a whole one. Says which file and what is wrong with it."""

    def __init__(self, path: Path, detail: str) -> None:
        self.path = path
        super().__init__(f"{path} is not a ring of communication records: {detail}")


@dataclass(frozen=True)
class RingInfo:
    """Who writes a ring, and for which group."""

    pid: int
    start_ticks: int  # when the process started, /proc/PID/stat field 22: tells reused pids apart
    pid_namespace: int  # inode of /proc/PID/ns/pid
    host: str
    label: str  # what the installer calls this process
    rank: int  # global; -1: not known
    group: str  # torch's name of the group
    group_desc: str
    ranks: tuple[int, ...]  # global ranks of the group, in order; empty: not known
    group_rank: int
    group_size: int
    backend: str
    devices: tuple[str, ...]
    recorder: str  # "c++", or "python": the fallback
    recorder_reason: str  # why it is the fallback
    torch: str
    realtime_offset_ns: int  # CLOCK_REALTIME - CLOCK_MONOTONIC at creation
    clock: str = "CLOCK_MONOTONIC"

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Return what a ring's meta says. Raises: ValueError, RecursionError."""
        values = json.loads(text)
        names = sorted(field.name for field in fields(cls))
        if not isinstance(values, dict) or sorted(values) != names:
            raise ValueError(f"its meta is not an object with {', '.join(names)}")
        for field in fields(cls):
            value = values[field.name]
            if field.type in (int, str):
                is_right = type(value) is field.type
            else:
                item = int if field.name == "ranks" else str
                is_right = type(value) is list and all(type(each) is item for each in value)
                values[field.name] = tuple(value) if is_right else ()
            if not is_right:
                raise ValueError(f"its meta says {field.name} is {value!r:.60}")
        return cls(**values)


def create_ring(path: Path, info: RingInfo, capacity: int = DEFAULT_CAPACITY) -> None:
    """Make an empty ring at `path`, whole or not at all.

    Its memory is taken now, so that a full /dev/shm is an error here, and not a SIGBUS in the
    middle of a collective.

    Raises: OSError; FileExistsError when there is one.
    """
    if not 2 <= capacity <= MAX_CAPACITY or capacity & (capacity - 1):
        raise ValueError(f"capacity is {capacity}; give a power of two from 2 to {MAX_CAPACITY}")
    meta = json.dumps({field.name: getattr(info, field.name) for field in fields(info)}).encode()
    header_bytes = -(-(META_OFFSET + len(meta)) // _PAGE_BYTES) * _PAGE_BYTES
    sizes = (VERSION, header_bytes, RECORD_BYTES, capacity, len(meta), ENDS_UNKNOWN)
    # Not with our pid, which a process of another PID namespace may have, too.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, header_bytes + capacity * RECORD_BYTES)
        os.pwrite(fd, HEADER.pack(MAGIC, *sizes, time.monotonic_ns(), 0), 0)
        os.pwrite(fd, meta, META_OFFSET)
        os.link(draft, path)
    finally:
        os.close(fd)
        os.unlink(draft)


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since the boot; 0 when it is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name of the program, in brackets, may itself hold spaces and brackets.
    values = stat.rpartition(")")[2].split()
    return 0 if values[0] in "ZX" else int(values[19])


def pid_namespace() -> int:
    """Return the inode of this process's PID namespace; pids of two namespaces do not compare."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
