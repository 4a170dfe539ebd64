"""Cross between hosts in few messages, and fan out inside.

Out:   1. between hosts: all rows for a host, to the partner there (host_layout.py)
       2. inside hosts: what came for each rank, and the own rows for it (host_passing.py)
Home:  the same backwards: inside hosts to the source's partner, then between hosts.

Messages of one movement, per rank, with m hosts of p ranks: m - 1 between hosts (the flat exchange
has (m - 1) p) and p - 1 inside; twice as many of each where rows are many, so that passing on hides
behind the crossing. Bytes between hosts: the same rows as in the flat exchange; inside hosts those,
again, that came for another rank of the host. So it wins by the number of messages, not by bytes,
unless it deduplicates.

With `deduplicate`, step 1 of Out carries each token once per host, however many of the host's
experts it is for, and for each row the number of its token among them (int32), or, in the
backward of combine, its weight. The partner copies (and weighs) before it passes rows on: the same
products of the same numbers as at home, so the same bits. With k choices that are spread evenly
over m hosts, a host gets 1 - (1 - 1/m)^k copies of a token instead of k/m.
Home stays row by row, because a partner that summed the rows of a token would sum in another order
than one process does.

P = ranks of a host, N = ranks on "ep", E = experts, L = local experts, T = tokens, D = dim,
R = rows of this rank's tokens, Q = rows for its experts, U = copies (tokens for one host)
"""

from functools import lru_cache

import torch
from torch import Tensor

from gangline.comm.host_crossing import RowCrossing, TokenCopies, TokenCrossing, find_copies
from gangline.comm.host_layout import HostLayout, host_layout
from gangline.comm.host_passing import WayBack, WayOut
from gangline.comm.host_ways import exchange_ways
from gangline.comm.mesh import Mesh
from gangline.comm.row_exchange import can_expect
from gangline.comm.row_order import take_runs
from gangline.comm.token_exchange_autograd import Direction
from gangline.kernels.permute import Permutation


class HierarchicalCarrier:
    """Carry rows over this rank's partners on other hosts; see Carrier."""

    def __init__(self, plan: Permutation, mesh: Mesh, *, deduplicate: bool) -> None:
        """Exchange the counts, in the same two steps as rows, and plan the ways.

        Communicates: over "ep", P L counts to each partner (and the number of its tokens), then L
        per source to each rank of the host.
        """
        axis = mesh.axes["ep"]
        layout = host_layout(axis.hosts, axis.index)
        counts_NL = plan.rows_per_expert_E.view(axis.size, -1)
        copies = tokens_H = None
        if deduplicate:
            hosts_N = _constant(axis.hosts, counts_NL.device)
            copies = find_copies(plan, counts_NL.sum(1), hosts_N, len(layout.members))
            tokens_H = copies.tokens_H
        ways = exchange_ways(counts_NL, tokens_H, layout, mesh, "dispatch counts")
        self.plan, self.mesh, self.ways = plan, mesh, ways
        self.copies = None if copies is None else TokenCopies(plan, copies, ways)
        num_local = counts_NL.shape[1]
        by_expert, by_arrival = _regroupings(layout, num_local, counts_NL.device)
        lengths, num_rows = ways.arrivals_AL.flatten(), sum(ways.arrival_rows)
        self.order_Q = take_runs(lengths, by_expert, num_rows)
        self.inverse_Q = take_runs(lengths[by_expert], by_arrival, num_rows)
        self.rows_per_expert = [ways.arrivals_AL.sum(0)]
        self.experts_per_group: tuple[int, ...] = (num_local,)

    def leave(
        self, x_TD: Tensor, weights_R: Tensor | None, direction: Direction
    ) -> "HierarchicalTrip":
        """See Carrier."""
        return HierarchicalTrip(self, x_TD, weights_R, direction)

    def expect_crossing(
        self, out: WayOut, like: Tensor, weights_R: Tensor | None, op: str
    ) -> RowCrossing | TokenCrossing:
        """Post the receives of a crossing between hosts, whose rows go the way out."""
        rest = (self.ways, self.mesh, f"{op} between hosts", out.passed_on)
        if self.copies is None:
            return RowCrossing(*rest, like=like)
        return TokenCrossing(self.copies, *rest, like=like, weights_R=weights_R)


class HierarchicalTrip:
    """A round trip in one block, over partners; see Trip."""

    def __init__(
        self,
        carrier: HierarchicalCarrier,
        x_TD: Tensor,
        weights_R: Tensor | None,
        direction: Direction,
    ) -> None:
        self._carrier, self._direction = carrier, direction
        # All receives are posted before anything is sent: see row_exchange.py.
        self._out = WayOut(carrier.ways, carrier.mesh, direction.out, like=x_TD)
        self._crossing = carrier.expect_crossing(self._out, x_TD, weights_R, direction.out)
        self._back: WayBack | None = None
        if can_expect(x_TD):
            self._back = WayBack(carrier.ways, carrier.mesh, direction.back, like=x_TD)
        rows = (x_TD, carrier.plan.token_of_row_R, weights_R)
        self._crossing.send(*rows)
        self._out.send_own(*rows)

    def arrive(self, block: int) -> Tensor:
        """See Trip."""
        self._crossing.land()
        self._out.pass_on()
        self._crossing.land_rest()
        received_QD = self._out.finish()
        del self._crossing, self._out  # and what has arrived in them
        return received_QD.index_select(0, self._carrier.order_Q)

    def send_back(self, block: int, rows_QD: Tensor) -> None:
        """See Trip."""
        if self._back is None:
            carrier = self._carrier
            self._back = WayBack(carrier.ways, carrier.mesh, self._direction.back, like=rows_QD)
        self._back.send(rows_QD.index_select(0, self._carrier.inverse_Q))

    def come_home(self) -> Tensor:
        """See Trip."""
        assert self._back is not None, "rows are sent back first"
        return self._back.finish()


@lru_cache(maxsize=64)
def _constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _regroupings(layout: HostLayout, num_local: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return runs of rows in (expert, source) order, by their number in order of arrival; and the
    inverse."""
    arrived = {source: number for number, source in enumerate(layout.arrivals)}
    by_expert = [
        arrived[source] * num_local + expert
        for expert in range(num_local)
        for source in range(len(arrived))
    ]
    by_arrival = sorted(range(len(by_expert)), key=by_expert.__getitem__)
    return _constant(tuple(by_expert), device), _constant(tuple(by_arrival), device)
