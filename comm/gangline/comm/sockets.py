"""Find the TCP connections that a gloo group made, and break them.

torch's `abort()` and `shutdown()` do nothing on gloo (torch 2.13: both return at once and a
blocked collective stays blocked until its time-out). Shutting the group's sockets down ends the
wait in about a millisecond, also when the peer is stopped and will never answer.

A socket counts as the group's when it was opened while the group was formed AND touches a
listening address of one of its ranks; a connection that another library opens at the same moment
stays untouched. Sockets are remembered by inode, so a reused file descriptor is never mistaken.
"""

import os
import socket
import stat
from collections.abc import Iterable, Iterator

Address = tuple[str, int]


def open_sockets() -> set[int]:
    """Return the inodes of all sockets of this process."""
    return {inode for inode, _ in _sockets()}


def listening_addresses(*, opened_since: set[int]) -> list[Address]:
    """Return the addresses on which sockets opened since then listen."""
    return [
        _address(sock.getsockname())
        for inode, sock in _sockets(skip=opened_since)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ]


def connections_between(addresses: Iterable[Address], *, opened_since: set[int]) -> set[int]:
    """Return the inodes of connections opened since then that touch one of `addresses`."""
    wanted = set(addresses)
    found = set()
    for inode, sock in _sockets(skip=opened_since):
        try:
            ends = {_address(sock.getsockname()), _address(sock.getpeername())}
        except OSError:  # listening, or closed by the peer just now
            continue
        if ends & wanted:
            found.add(inode)
    return found


def own_addresses(inodes: set[int]) -> list[Address]:
    """Return this process's ends of these connections."""
    return [_address(sock.getsockname()) for inode, sock in _sockets() if inode in inodes]


def address_towards(address: Address) -> str:
    """Return the address of this machine from which it reaches another; nothing is sent."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def shut_down(inodes: set[int]) -> int:
    """Shut these connections down in both directions; return how many were still open."""
    num_shut = 0
    for inode, sock in _sockets():
        if inode in inodes:
            try:
                sock.shutdown(socket.SHUT_RDWR)
                num_shut += 1
            except OSError:  # the peer was faster
                continue
    return num_shut


def _sockets(skip: set[int] | None = None) -> Iterator[tuple[int, socket.socket]]:
    # Each descriptor is duplicated before it is looked at, so that what we look at stays what it
    # is, whatever other threads close and open meanwhile.
    for name in os.listdir("/dev/fd"):
        try:
            status = os.fstat(int(name))
            if not stat.S_ISSOCK(status.st_mode):
                continue
            fd = os.dup(int(name))
        except OSError:
            continue
        inode = os.fstat(fd).st_ino
        if not stat.S_ISSOCK(os.fstat(fd).st_mode) or (skip and inode in skip):
            os.close(fd)
            continue
        with socket.socket(fileno=fd) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                yield inode, sock


def _address(name: tuple[str, int]) -> Address:
    # A v4 peer of a v6 socket shows as ::ffff:127.0.0.1.
    return name[0].removeprefix("::ffff:"), name[1]
