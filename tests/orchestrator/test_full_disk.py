"""A full disk stops no training: steps wait for room, logs lose lines, the journal waits."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gangline.orchestrator.journal import Journal, read_journal
from gangline.orchestrator.train_program import StepLog, step_log_path

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """Stands in for `os.write` on a disk that has room for so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_free: int) -> None:
        self.num_free = num_free
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, fd: int, data: bytes) -> int:
        if not self.num_free:
            raise FULL
        num_written = self._write(fd, data[: self.num_free])
        self.num_free -= num_written
        return num_written


def test_steps_wait_for_room_and_then_come_whole_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StepLog(tmp_path, 0, 0) as log:
        log.write("step", {"step": 1})
        disk = Disk(monkeypatch, num_free=10)  # half a line
        for step in range(2, 6):
            log.write("step", {"step": step})
        disk.num_free = 10**6
        log.write("step", {"step": 6})
    lines = step_log_path(tmp_path, 0).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_sick_disk_is_not_taken_for_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sick(fd: int, data: bytes) -> int:
        raise OSError(errno.EIO, "sick")

    with StepLog(tmp_path, 0, 0) as log:
        monkeypatch.setattr(os, "write", sick)
        with pytest.raises(OSError, match="sick"):
            log.write("step", {"step": 1})


def test_the_journal_waits_for_room_and_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("one", "", generation=0)
    file: Any = journal._file
    tries: list[int] = []

    class Tight:
        """A file that takes ten bytes, then none, and then all."""

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def write(self, data: bytes) -> int:
            tries.append(len(data))
            if len(tries) == 1:
                return int(file.write(data[:10]))
            if len(tries) == 2:
                raise FULL
            return int(file.write(data))

    journal._file = Tight()  # type: ignore[assignment]
    journal.append("two", "", generation=0)
    assert len(tries) == 3
    assert [record["event"] for record in read_journal(path)] == ["one", "two"]


def test_a_rank_that_cannot_print_goes_on(tmp_path: Path) -> None:
    program = """
import os, sys
from gangline.orchestrator.worker import _LogStream
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
sys.stdout = _LogStream(1)
for _ in range(5000):
    print("a line that finds no room")
sys.stdout.flush()
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 1)
print("there is room again")
"""
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", program, str(log)], timeout=60, check=False)
    assert done.returncode == 0
    assert log.read_text().endswith("there is room again\n")


def test_waiting_for_room_ends_when_there_is_some(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    file: Any = journal._file
    has_room = threading.Event()

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def write(self, data: bytes) -> int:
            if not has_room.is_set():
                raise FULL
            return int(file.write(data))

    journal._file = Full()  # type: ignore[assignment]
    threading.Timer(0.5, has_room.set).start()
    start_s = time.monotonic()
    journal.append("one", "", generation=0)
    assert time.monotonic() - start_s > 0.4
