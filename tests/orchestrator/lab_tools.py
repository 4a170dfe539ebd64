"""What the lab's tests share: when they are skipped, and TCP through a lab's links."""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gangline.orchestrator.lab import Lab, in_network, why_no_lab
from gangline.orchestrator.lab_file import LabFile, load_lab

Traces = dict[str, frozenset[object]]

_WHY_NOT = why_no_lab()
needs_lab = [pytest.mark.lab, pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))]
_CHUNK = bytes(2**18)


def a_lab(text: str = "", *, ray: bool = False) -> LabFile:
    return load_lab(f"name: test\n{text}\nray: {{enabled: {str(ray).lower()}}}\n")


class Connection:
    """A TCP connection from one host to another; both ends are sockets of this process."""

    def __init__(self, lab: Lab, source: str, to: str, *, plane: int = 0, port: int = 0) -> None:
        with in_network(lab.hosts[to].network):
            listener = socket.create_server((lab.hosts[to].ips[plane], 0))
        with listener, in_network(lab.hosts[source].network):
            self.source = socket.create_connection(
                listener.getsockname(), 5.0, (lab.hosts[source].ips[plane], port)
            )
            self.to, _ = listener.accept()
        self.source.settimeout(10.0)
        self.to.settimeout(10.0)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()
        self.to.close()

    def rate_mbit(self, num_bytes: int) -> float:
        """Send so much from `source` and return the rate at which it came, after a warm-up."""
        arrivals: list[tuple[float, int]] = []

        def receive() -> None:
            buffer, num_received = bytearray(2**18), 0
            while num_received < num_bytes:
                num_received += self.to.recv_into(buffer)
                arrivals.append((time.monotonic(), num_received))

        receiver = threading.Thread(target=receive)
        receiver.start()
        for start in range(0, num_bytes, len(_CHUNK)):
            self.source.sendall(_CHUNK[: num_bytes - start])
        receiver.join()
        # The first part may pass at once: the bucket of tokens is full.
        start_s, num_before = next(a for a in arrivals if a[1] >= num_bytes // 4)
        end_s, num_after = arrivals[-1]
        return (num_after - num_before) * 8e-6 / (end_s - start_s)


def arrives(source: socket.socket, to: socket.socket, within_s: float) -> bool:
    """Send a byte and tell whether it arrives in time."""
    source.sendall(b"x")
    to.settimeout(within_s)
    try:
        return to.recv(1) == b"x"
    except TimeoutError:
        return False


@contextmanager
def nothing_left_behind(*marks: str) -> Iterator[None]:
    """Check that a block leaves nothing of a lab: see `_traces`.

    `marks` are words in the command lines of what the block starts in hosts. A namespace of which
    no process is left, no descriptor and no mount, is gone: so these are what is looked for.
    """
    marks = (*marks, f'"keeper_pid": {os.getpid()}')
    before = _traces(marks)
    yield
    after = _wait_for(lambda: _traces(marks), before)
    for kind, found in after.items():
        assert found == before[kind], f"{kind}: left {found - before[kind]}"


def _wait_for(look: Callable[[], Traces], wanted: Traces) -> Traces:
    deadline_s = time.monotonic() + 3.0
    while (found := look()) != wanted and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return found


def _traces(marks: tuple[str, ...]) -> Traces:
    return {
        "processes": frozenset(processes_with(*marks)),
        "children": frozenset(_children()),  # also those that nobody has waited for
        "descriptors": frozenset(_namespace_descriptors()),
        "mounts": frozenset(Path("/proc/self/mountinfo").read_text().splitlines()),
        "interfaces": frozenset(os.listdir("/sys/class/net")),
        "networks with names": frozenset(_names_in("/run/netns")),
        "shared memory": frozenset(name for name in _names_in("/dev/shm") if "ray" in name),
    }


def processes_with(*marks: str) -> dict[int, str]:
    """Return the processes that have one of some words in their command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and entry.name != str(os.getpid()):
            with suppress(OSError):
                command = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                )
                if any(mark in command for mark in marks):
                    found[int(entry.name)] = command
    return found


def _children() -> list[str]:
    tasks = Path("/proc/self/task").iterdir()
    return [pid for task in tasks for pid in (task / "children").read_text().split()]


def _namespace_descriptors() -> list[str]:
    links = []
    for entry in os.scandir("/proc/self/fd"):
        with suppress(OSError):
            links.append(os.readlink(entry.path))
    return [link for link in links if re.match(r"(net|mnt|pid|uts|ipc):\[", link)]


def _names_in(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []
