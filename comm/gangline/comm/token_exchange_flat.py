"""Send rows straight to the rank of their expert, in one block or in chunks.

    rows by expert  --blocks-->  by (source, expert)  --regroup-->  by (expert, source)
    experts run     <--blocks--  by (source, expert)  <--regroup--  by (expert, source)

A rank's rows keep their order, so an expert sees the rows of all ranks exactly as one process
would that held the ranks' tokens one after the other.

A chunk is a run of whole local experts, the same on every rank. All chunks leave at once, first
chunk first, and arrive in this order; the results of a chunk leave while the next is computed. An
expert is never cut, so chunks change no bit of the result and make no product smaller, and there
are at most as many as local experts. Cutting by tokens, as Tutel and FasterMoE do, overlaps also
where a rank has one expert, but it splits every product, and every sum over tokens in a weight's
gradient.

Messages of one movement, per rank: one to each other rank and chunk (none where no row goes).
Bytes: each row that leaves the rank, once.

N = ranks on "ep", E = experts, L = local experts, R = rows of this rank's tokens, Q = rows for its
experts (of a chunk), D = dim
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gangline.comm.handle import Handle
from gangline.comm.mesh import Mesh
from gangline.comm.row_exchange import (
    ExpectedBlocks,
    can_expect,
    exchange_counts,
    expect_blocks,
)
from gangline.comm.row_order import regroup
from gangline.comm.token_exchange_autograd import Direction
from gangline.kernels.permute import Permutation


@dataclass(frozen=True)
class Route:
    """The ways of one chunk's rows."""

    home: list[slice]  # per rank of the axis: the rows for it, in the order of the plan
    recv_rows: list[int]  # per rank of the axis
    rows_per_expert_L: Tensor  # of the chunk's experts
    order_Q: Tensor | None  # (expert, source) from (source, expert); None = the same
    inverse_Q: Tensor | None

    def to_experts(self, received_QD: Tensor) -> Tensor:
        """Sort by expert what came sorted by source."""
        return received_QD if self.order_Q is None else received_QD.index_select(0, self.order_Q)

    def to_sources(self, rows_QD: Tensor) -> Tensor:
        """Sort by source what the experts have."""
        return rows_QD if self.inverse_Q is None else rows_QD.index_select(0, self.inverse_Q)


class FlatCarrier:
    """Carry each row in one message to its expert's rank; see Carrier."""

    def __init__(self, plan: Permutation, mesh: Mesh, num_chunks: int) -> None:
        """Exchange the counts, and plan the ways.

        Communicates: over "ep", L counts to each rank.
        """
        counts_NL = plan.rows_per_expert_E.view(mesh.axis_size("ep"), -1)
        incoming_NL = exchange_counts(counts_NL, mesh, "ep")
        # The one wait for the device: the sizes of what is sent and received.
        sent, received = torch.stack([counts_NL, incoming_NL]).tolist()
        self.plan, self.mesh = plan, mesh
        self.routes = [
            make_route(sent, received, incoming_NL, experts)
            for experts in cut(counts_NL.shape[1], num_chunks)
        ]
        self.rows_per_expert = [route.rows_per_expert_L for route in self.routes]
        self.experts_per_group = tuple(len(rows) for rows in self.rows_per_expert)

    def leave(self, x_TD: Tensor, weights_R: Tensor | None, direction: Direction) -> "FlatTrip":
        """See Carrier."""
        return FlatTrip(self, x_TD, weights_R, direction)


class FlatTrip:
    """A round trip in blocks; see Trip."""

    def __init__(
        self, carrier: FlatCarrier, x_TD: Tensor, weights_R: Tensor | None, direction: Direction
    ) -> None:
        self._carrier, routes = carrier, carrier.routes
        blocks = list(range(len(routes)))
        if direction.last_block_first:
            blocks.reverse()
        expected: dict[int, ExpectedBlocks] = {}
        self._received: dict[int, Tensor] = {}
        for block in blocks:
            recv_rows = routes[block].recv_rows
            received = self._received[block] = x_TD.new_empty(sum(recv_rows), x_TD.shape[1])
            incoming = received.split(recv_rows)
            expected[block] = expect_blocks(incoming, carrier.mesh, "ep", op=direction.out)
        self._back = WayBack(routes, carrier.mesh, direction)
        if can_expect(x_TD):
            self._back.expect(blocks, like=x_TD)
        rows_RD = x_TD.index_select(0, carrier.plan.token_of_row_R)
        if weights_R is not None:
            rows_RD.mul_(weights_R.unsqueeze(-1))
        self._handles = {
            block: expected[block].send([rows_RD[rows] for rows in routes[block].home])
            for block in blocks
        }

    def arrive(self, block: int) -> Tensor:
        """See Trip."""
        self._handles[block].wait()
        return self._carrier.routes[block].to_experts(self._received.pop(block))

    def send_back(self, block: int, rows_QD: Tensor) -> None:
        """See Trip."""
        self._back.send(block, rows_QD)

    def come_home(self) -> Tensor:
        """See Trip."""
        return self._back.come_home()


class WayBack:
    """Send blocks straight to their places at home."""

    def __init__(self, routes: list[Route], mesh: Mesh, direction: Direction) -> None:
        self._routes, self._mesh, self._op = routes, mesh, direction.back
        self._rows_RD: Tensor | None = None
        self._expected: dict[int, ExpectedBlocks] = {}
        self._handles: list[Handle] = []

    def expect(self, blocks: list[int], *, like: Tensor) -> None:
        """Make room at home and post the receives, in the order in which blocks will be sent."""
        if self._rows_RD is None:
            num_rows = self._routes[-1].home[-1].stop
            self._rows_RD = like.new_empty(num_rows, like.shape[1])
        for block in blocks:
            incoming = [self._rows_RD[rows] for rows in self._routes[block].home]
            self._expected[block] = expect_blocks(incoming, self._mesh, "ep", op=self._op)

    def send(self, block: int, rows_QD: Tensor) -> None:
        """Start to send a block's rows home."""
        if block not in self._expected:
            self.expect([block], like=rows_QD)
        route = self._routes[block]
        outgoing = route.to_sources(rows_QD).split(route.recv_rows)
        self._handles.append(self._expected.pop(block).send(outgoing))

    def come_home(self) -> Tensor:
        """Wait for all blocks, and return the rows in the order of the plan."""
        for handle in self._handles:
            handle.wait()
        assert self._rows_RD is not None, "every block is sent back first"
        return self._rows_RD


def make_route(
    sent_NL: list[list[int]], received_NL: list[list[int]], incoming_NL: Tensor, experts: slice
) -> Route:
    """Plan the ways to these local experts of every rank.

    Shapes: the counts [N, L], rows for each other rank's experts and rows from each other rank;
    the latter once more on the device.
    """
    num_local = len(sent_NL[0])
    starts = [0, *accumulate(count for row in sent_NL for count in row)]
    home = [
        slice(starts[first + experts.start], starts[first + experts.stop])
        for first in range(0, len(starts) - 1, num_local)
    ]
    recv_rows = [sum(row[experts]) for row in received_NL]
    arriving_NL = incoming_NL[:, experts]
    order = inverse = None
    if min(arriving_NL.shape) > 1:
        order = regroup(arriving_NL, sum(recv_rows))
        inverse = regroup(arriving_NL.t(), sum(recv_rows))
    return Route(home, recv_rows, arriving_NL.sum(0), order, inverse)


def cut(num_local_experts: int, num_chunks: int) -> list[slice]:
    """Return the runs of experts of each chunk, as even as can be; at most one chunk an expert."""
    num_chunks = min(num_chunks, num_local_experts)
    ends = [num_local_experts * chunk // num_chunks for chunk in range(num_chunks + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
