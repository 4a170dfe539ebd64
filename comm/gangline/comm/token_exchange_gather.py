"""Give every rank every token, and let it take the rows of its experts.

Out:   all tokens to all ranks, and to each rank the tokens' numbers of its rows (in the backward:
       their weights); the rank copies and weighs. The same products of the same numbers as at
       home, so the same bits.
Home:  row by row, as in the flat exchange: the rows of a token are summed at home, in the order of
       its choices.

Messages out, per rank: two to each other rank. Bytes out, per rank, with T tokens of D elements:
(N - 1) T D, where the flat exchange sends K T D (N - 1) / N: less only where a token has more
choices than there are ranks. And each rank holds the tokens of ALL ranks while it takes its rows,
so that buffer grows with the number of ranks.

N = ranks on "ep", T = tokens, D = dim, L = local experts, R = rows of this rank's tokens, Q = rows
for its experts
"""

from itertools import accumulate

import torch
from torch import Tensor

from gangline.comm.mesh import Mesh
from gangline.comm.row_exchange import can_expect, exchange_counts, expect_blocks
from gangline.comm.token_exchange_autograd import Direction
from gangline.comm.token_exchange_flat import WayBack, make_route
from gangline.kernels.permute import Permutation


class GatherCarrier:
    """Carry all tokens to all ranks, and rows home; see Carrier."""

    def __init__(self, plan: Permutation, mesh: Mesh) -> None:
        """Exchange the counts, of rows and of tokens, and plan the ways.

        Communicates: over "ep", L + 1 counts to each rank.
        """
        counts_NL = plan.rows_per_expert_E.view(mesh.axis_size("ep"), -1)
        num_local = counts_NL.shape[1]
        num_tokens_N1 = torch.full_like(counts_NL[:, :1], plan.row_of_choice_TK.shape[0])
        outgoing = torch.cat([counts_NL, num_tokens_N1], dim=1)
        incoming = exchange_counts(outgoing, mesh, "ep")
        # The one wait for the device: the sizes of what is sent and received.
        sent, received = torch.stack([outgoing, incoming]).tolist()
        sent_NL = [row[:num_local] for row in sent]
        self.plan, self.mesh = plan, mesh
        self.tokens_of = [row[num_local] for row in received]  # per rank
        self.route = make_route(sent_NL, received, incoming, slice(0, num_local))
        self.token_of_row_Q: Tensor | None = None  # among the tokens of all ranks
        self.rows_per_expert = [self.route.rows_per_expert_L]
        self.experts_per_group: tuple[int, ...] = (num_local,)

    def leave(self, x_TD: Tensor, weights_R: Tensor | None, direction: Direction) -> "GatherTrip":
        """See Carrier."""
        return GatherTrip(self, x_TD, weights_R, direction)


class GatherTrip:
    """A round trip in one block, out as tokens; see Trip."""

    def __init__(
        self, carrier: GatherCarrier, x_TD: Tensor, weights_R: Tensor | None, direction: Direction
    ) -> None:
        self._carrier, route, mesh = carrier, carrier.route, carrier.mesh
        self._is_gradient = weights_R is not None
        of_rows_R = carrier.plan.token_of_row_R.int() if weights_R is None else weights_R
        self._of_rows_Q = of_rows_R.new_empty(sum(route.recv_rows))
        op = f"{direction.out} ({'weights' if self._is_gradient else 'numbers'})"
        numbers = expect_blocks(self._of_rows_Q.split(route.recv_rows), mesh, "ep", op=op)
        self._tokens_XD = x_TD.new_empty(sum(carrier.tokens_of), x_TD.shape[1])
        incoming = self._tokens_XD.split(carrier.tokens_of)
        tokens = expect_blocks(incoming, mesh, "ep", op=direction.out)
        self._back = WayBack([route], mesh, direction)
        if can_expect(x_TD):
            self._back.expect([0], like=x_TD)
        self._handles = [
            numbers.send([of_rows_R[rows] for rows in route.home]),
            tokens.send([x_TD] * len(incoming)),
        ]

    def arrive(self, block: int) -> Tensor:
        """See Trip."""
        for handle in self._handles:
            handle.wait()
        carrier, tokens_XD = self._carrier, self._tokens_XD
        if not self._is_gradient:
            carrier.token_of_row_Q = self._number_tokens()
        assert carrier.token_of_row_Q is not None, "tokens travel before gradients"
        rows_QD = tokens_XD.index_select(0, carrier.token_of_row_Q)
        if self._is_gradient:
            rows_QD.mul_(carrier.route.to_experts(self._of_rows_Q).unsqueeze(-1))
        del self._tokens_XD
        return rows_QD

    def send_back(self, block: int, rows_QD: Tensor) -> None:
        """See Trip."""
        self._back.send(block, rows_QD)

    def come_home(self) -> Tensor:
        """See Trip."""
        return self._back.come_home()

    def _number_tokens(self) -> Tensor:
        """Return the token of each row, from the numbers that it has at its source."""
        carrier = self._carrier
        starts = accumulate(carrier.tokens_of, initial=0)
        per_source = self._of_rows_Q.split(carrier.route.recv_rows)
        for numbers, start in zip(per_source, starts, strict=False):
            numbers.add_(start)
        return carrier.route.to_experts(self._of_rows_Q)
