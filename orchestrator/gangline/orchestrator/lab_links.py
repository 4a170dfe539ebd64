"""The networks and the cables of a running lab.

A `Network` is a network namespace; this thread can move into one (`in_network`), and what it makes
there stays there. A `Link` is a pair of interfaces, each with a queue of its own that shapes what
it sends; every fault of a link is a setting of one end.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

from gangline.orchestrator.errors import LabError
from gangline.orchestrator.lab_fabric import LinkPlan, tbf
from gangline.orchestrator.lab_namespaces import NEWNET, inode, setns

Direction = Literal["both", "a_to_b", "b_to_a"]
"""Of a link. For a host's link a is the host's end: a_to_b is what the host sends."""
DIRECTIONS: Mapping[Direction, tuple[Direction, ...]] = {
    "both": ("a_to_b", "b_to_a"),
    "a_to_b": ("a_to_b",),
    "b_to_a": ("b_to_a",),
}
_TOOL_TIMEOUT_S = 20.0
_SBIN = "/usr/sbin:/sbin"  # not on everybody's PATH
_FAILED_LINE = re.compile(r"Command failed -:([0-9]+)")


@dataclass(frozen=True)
class Network:
    """One network namespace of a lab: "host0", "star", "leaf0", "spine1"; in plane 1 "leaf0.1".

    `path` opens it while it is there, and `inode` tells whether it is still the same.
    """

    name: str
    path: str
    inode: int

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Yield a descriptor of the namespace. Held for long it would outlive its host.

        Raises: LabError when its host is dead.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            raise LabError(f"{self.name} is dead: its network is gone") from None
        try:
            # A later process may have got the pid of a dead host's init.
            if inode(fd) != self.inode:
                raise LabError(f"{self.name} is dead: its network is gone")
            yield fd
        finally:
            os.close(fd)


@contextmanager
def in_network(network: Network) -> Iterator[None]:
    """Move this thread into a network, and back at the end.

    Sockets that are made and programs that are started meanwhile belong to it for ever.

    Raises: LabError when its host is dead.
    """
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with network.opened() as there:
            setns(there, NEWNET)
        try:
            yield
        finally:
            setns(here, NEWNET)
    finally:
        os.close(here)


@cache
def tool(name: str) -> str | None:
    """Return where a tool of iproute2 is, or None."""
    return shutil.which(name) or shutil.which(name, path=_SBIN)


def run_tool(network: Network, argv: Sequence[str], lines: Sequence[str] = ()) -> str:
    """Run ip, tc or bridge in a network; return what it printed. `lines` go to its stdin.

    Raises: LabError with the tool's own words when it fails.
    """
    process = start_tool(network, argv)
    return end_tool(network, argv, process, lines)


def start_tool(network: Network, argv: Sequence[str]) -> subprocess.Popen[str]:
    """Start a tool in a network; `end_tool` waits for it."""
    program = tool(argv[0])
    if program is None:
        raise LabError(f"`{argv[0]}` is not installed; install iproute2")
    with in_network(network):
        return subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def end_tool(
    network: Network, argv: Sequence[str], process: subprocess.Popen[str], lines: Sequence[str]
) -> str:
    """Give a tool its input, wait for its end, and return what it printed.

    Raises: LabError with its own words when it fails.
    """
    try:
        out, err = process.communicate("".join(f"{line}\n" for line in lines), _TOOL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise LabError(f"{network.name}: {' '.join(argv)} did not end") from None
    if process.returncode != 0:
        said = " ".join(err.split()) or f"it ended with {process.returncode}"
        failed = _FAILED_LINE.search(said)
        command = f"{argv[0]} {lines[int(failed[1]) - 1]}" if failed else " ".join(argv)
        raise LabError(f"{network.name}: {command}: {_FAILED_LINE.sub('', said).strip()}")
    return out


@dataclass(frozen=True)
class End:
    """One end of a link: an interface in a network namespace."""

    network: Network
    interface: str


@dataclass(frozen=True)
class LinkBytes:
    """What has arrived over a link so far, Ethernet headers included."""

    a_to_b: int
    b_to_a: int


class Link:
    """A cable: two interfaces, each of which shapes what it sends.

    Names: "host0" (plane 0), "host0.1" (plane 1), "leaf0-spine1", "leaf0-spine1.1". Of a host's
    link, a is the host's end and b the switch's; of an up-link, a is the leaf's and b the spine's.
    """

    def __init__(
        self, plan: LinkPlan, a: End, b: End, on_carrier: Callable[[], None] = lambda: None
    ) -> None:
        self.name = plan.name
        self.a, self.b = a, b
        self.rate_mbit = plan.rate_mbit  # as the lab file says; None is unshaped
        self._restore_b = plan.restore_b
        self._on_carrier = on_carrier
        self._rates: dict[Direction, float | None] = dict.fromkeys(
            DIRECTIONS["both"], plan.rate_mbit
        )
        self._dropped: set[Direction] = set()
        self._is_up = True
        self._lock = threading.RLock()

    @property
    def is_up(self) -> bool:
        """Tell whether there is a carrier."""
        return self._is_up

    def rate_now_mbit(self, direction: Direction) -> float | None:
        """Return at what rate one direction sends now; None is unshaped."""
        return self._rates[direction]

    def set_rate(self, mbit: float | None, direction: Direction = "both") -> None:
        """Shape what the link sends from now on; None takes the shaping away.

        Raises: LabError when a host of it is dead.
        """
        with self._lock:
            for each in DIRECTIONS[direction]:
                self._rates[each] = mbit
                self._shape(each)

    def blackhole(self, direction: Direction = "both") -> None:
        """Drop silently what the link should carry: carrier up, no reset, no ICMP.

        The packets vanish where they would be sent, behind a queue that says it took them, so that
        the sender's own kernel knows no more than its peer does.
        """
        with self._lock:
            for each in DIRECTIONS[direction]:
                self._dropped.add(each)
                self._shape(each)

    def set_carrier(self, up: bool) -> None:
        """Pull the cable out, or put it back. Both ends lose their carrier.

        The fabric's routes are withdrawn and come back, as a routing protocol would do it.
        """
        with self._lock:
            if up != self._is_up:
                restore = self._restore_b if up else ()
                lines = [f"link set {self.b.interface} {'up' if up else 'down'}", *restore]
                run_tool(self.b.network, ["ip", "-batch", "-"], lines)
                self._is_up = up
                self._on_carrier()

    def heal(self) -> None:
        """Undo `blackhole`, `set_carrier(False)` and `set_rate`."""
        with self._lock:
            self._dropped.clear()
            self.set_rate(self.rate_mbit)
            self.set_carrier(True)

    def num_bytes(self) -> LinkBytes:
        """Read what has arrived at each end so far.

        Raises: LabError when a host of it is dead.
        """
        # thread-self: plain /proc/net is that of the process's first thread.
        with in_network(self.b.network), open("/proc/thread-self/net/dev") as counters:
            for line in counters:
                interface, _, numbers = line.partition(":")
                if interface.strip() == self.b.interface:
                    fields = numbers.split()
                    return LinkBytes(a_to_b=int(fields[0]), b_to_a=int(fields[8]))
        raise LabError(f"link {self.name} is gone: a host at its end is dead")

    def _shape(self, direction: Direction) -> None:
        end = self.a if direction == "a_to_b" else self.b
        rate = self._rates[direction]
        if direction in self._dropped:
            queue = "blackhole"
        elif rate is not None:
            queue = tbf(rate)
        else:
            # As a new veth has it. Without `replace` there may be nothing to delete.
            queue = "noqueue"
        run_tool(
            end.network, ["tc", "qdisc", "replace", "dev", end.interface, "root", *queue.split()]
        )
