"""Exchange how many rows go over which partner, and keep it.

P = ranks of this host, N = ranks on "ep", A = sources in the order of arrival (N again), L = local
experts, H = hosts, R = rows of this rank's tokens
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

import torch
from torch import Tensor

from gangline.comm.host_layout import HostLayout
from gangline.comm.mesh import Mesh
from gangline.comm.row_exchange import expect_blocks


@dataclass(frozen=True)
class Ways:
    """How many rows go where: known on the host, after one wait for the device."""

    layout: HostLayout
    home: list[slice]  # per place: the rows for it, in the order of the plan
    via_rows: dict[int, list[int]]  # from each source that this rank speaks for, to each near rank
    arrival_rows: list[int]  # to this rank, from each of layout.arrivals
    arrivals_AL: Tensor  # int64, the same per local expert, on the device
    tokens_to: dict[int, int]  # per other host; empty where tokens are not counted
    tokens_from: dict[int, int]  # per source; likewise

    def own_rows(self, place: int) -> int:
        """Return how many rows of this rank's tokens go to a place."""
        num_rows: int = self.home[place].stop - self.home[place].start
        return num_rows

    def rows_for(self, host: int) -> int:
        """Return how many rows of this rank's tokens go to a host."""
        return sum(self.own_rows(place) for place in self.layout.members[host])

    def parts_for(self, near: int) -> list[int]:
        """Return the rows that go from this rank to a near one: its own, then each source's."""
        index = self.layout.mine.index(near)
        return [self.own_rows(near), *(rows[index] for rows in self.via_rows.values())]

    def arrivals_of(self, near: int) -> list[int]:
        """Return the rows that come over a near rank: its own, then each source's."""
        first = self.layout.arrivals.index(near)
        return self.arrival_rows[first : first + 1 + len(self.layout.speaks_for(near))]

    def arrivals_over(self) -> list[int]:
        """Return how many rows come over each near rank."""
        return [sum(self.arrivals_of(near)) for near in self.layout.mine]

    def of_places(self, tensor_R: Tensor, places: list[int]) -> Tensor:
        """Return the parts for these places; a view where they are neighbours on the axis."""
        parts = [tensor_R[self.home[place]] for place in places]
        if not parts or places[-1] - places[0] != len(places) - 1:
            return torch.cat([tensor_R[:0], *parts])
        return tensor_R[self.home[places[0]].start : self.home[places[-1]].stop]

    def put_back(self, rows: Tensor, tensor_R: Tensor, places: list[int]) -> None:
        """Put what `of_places` gave back in its places; nothing to do for a view."""
        if places and places[-1] - places[0] != len(places) - 1:
            parts = rows.split([self.own_rows(place) for place in places])
            for place, part in zip(places, parts, strict=True):
                tensor_R[self.home[place]] = part


def exchange_ways(
    counts_NL: Tensor, tokens_H: Tensor | None, layout: HostLayout, mesh: Mesh, op: str
) -> Ways:
    """Tell each rank what comes over it, in the same two steps as rows will come.

    Shapes: counts_NL [N, L] int64, rows for each expert; tokens_H [H] int64, tokens for each host,
    None where they are not needed.
    Communicates: over "ep", the counts for a host to the partner there, and what came, per rank of
    this host, to that rank.
    """
    num_local = counts_NL.shape[1]
    sources = layout.speaks_for(layout.place)
    near_counts = len(layout.mine) * num_local
    none = [counts_NL.new_empty(0)] * len(layout.hosts)
    arrived, crossed, outgoing = list(none), list(none), list(none)
    for near in layout.mine:
        arrived[near] = counts_NL.new_empty(1 + len(layout.speaks_for(near)), num_local)
    for source in sources:
        crossed[source] = counts_NL.new_empty(near_counts + (tokens_H is not None))
    # The receives of both steps are posted before anything is sent: see row_exchange.py.
    inside = expect_blocks(arrived, mesh, "ep", op=f"{op} inside hosts")
    between = expect_blocks(crossed, mesh, "ep", op=f"{op} between hosts")

    for host, partner in layout.partners.items():
        rows = [counts_NL[place] for place in layout.members[host]]
        extra = [] if tokens_H is None else [tokens_H[host : host + 1]]
        outgoing[partner] = torch.cat(rows + extra)
    between.send(outgoing).wait()

    outgoing = list(none)
    for index, near in enumerate(layout.mine):
        via = [crossed[source][:near_counts].view(-1, num_local)[index] for source in sources]
        outgoing[near] = torch.stack([counts_NL[near], *via])
    inside.send(outgoing).wait()

    arrivals_AL = torch.cat([arrived[near] for near in layout.mine])
    own = [counts_NL.sum(1), *([] if tokens_H is None else [tokens_H])]
    flat = [*own, arrivals_AL.sum(1), *(crossed[source] for source in sources)]
    # The one wait for the device: the sizes of what is sent, passed on and received.
    numbers = iter(torch.cat(flat).tolist())
    return _read(numbers, layout, arrivals_AL, num_hosts=0 if tokens_H is None else len(tokens_H))


def _read(
    numbers: Iterator[int], layout: HostLayout, arrivals_AL: Tensor, *, num_hosts: int
) -> Ways:
    num_ranks, num_local = arrivals_AL.shape

    def take(count: int) -> list[int]:
        return list(islice(numbers, count))

    ends = [0, *accumulate(take(num_ranks))]
    tokens_H = take(num_hosts)
    arrival_rows = take(num_ranks)
    via_rows, tokens_from = {}, {}
    for source in layout.speaks_for(layout.place):
        per_near = [take(num_local) for _ in layout.mine]
        via_rows[source] = [sum(rows) for rows in per_near]
        if tokens_H:
            (tokens_from[source],) = take(1)
    return Ways(
        layout=layout,
        home=[slice(start, end) for start, end in pairwise(ends)],
        via_rows=via_rows,
        arrival_rows=arrival_rows,
        arrivals_AL=arrivals_AL,
        tokens_to=dict(enumerate(tokens_H)),
        tokens_from=tokens_from,
    )
