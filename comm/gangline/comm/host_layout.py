"""Say which rank of a host speaks for which rank of another; torch-free.

A host is a set of ranks with fast links between them. Between two hosts rank g of the one (its
g-th, from 0) speaks with rank g of the other; where the other has fewer, they start again from its
first. So each rank meets one rank of every other host, its *partner* there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class HostLayout:
    """The hosts of an axis, seen from one of its ranks. Ranks go by their place on the axis."""

    hosts: tuple[int, ...]  # the host of each place
    place: int

    @cached_property
    def members(self) -> list[list[int]]:
        """The places on each host, in order."""
        members: list[list[int]] = [[] for _ in range(max(self.hosts) + 1)]
        for place, host in enumerate(self.hosts):
            members[host].append(place)
        return members

    @property
    def host(self) -> int:
        """The host of this place."""
        return self.hosts[self.place]

    @property
    def mine(self) -> list[int]:
        """The places on this one's host, itself included."""
        return self.members[self.host]

    @cached_property
    def partners(self) -> dict[int, int]:
        """The partner of this place on each other host."""
        return {
            host: self.partner(self.place, host)
            for host, members in enumerate(self.members)
            if members and host != self.host
        }

    def partner(self, place: int, host: int) -> int:
        """Return the partner of a place on another host."""
        of_host = self.members[host]
        return of_host[self.members[self.hosts[place]].index(place) % len(of_host)]

    def speaks_for(self, place: int) -> list[int]:
        """Return the places on other hosts whose partner a place is, in order."""
        host = self.hosts[place]
        return [
            other
            for other in range(len(self.hosts))
            if self.hosts[other] != host and self.partner(other, host) == place
        ]

    @cached_property
    def arrivals(self) -> list[int]:
        """All places, in the order in which their rows reach this one through its host's ranks."""
        return [source for near in self.mine for source in (near, *self.speaks_for(near))]


@lru_cache(maxsize=64)
def host_layout(hosts: Sequence[int], place: int) -> HostLayout:
    """Return the layout of these hosts, seen from this place; made once."""
    return HostLayout(tuple(hosts), place)
