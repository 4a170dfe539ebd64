"""Carry rows from a rank to the partners on other hosts, row by row or each token once.

A crossing posts its receives when it is made, `send` sends, and `land` waits and lays the rows
where they are to be passed on. Where each token is sent once, a message is a parcel of bytes:

    tokens [U, D]  |  a number per row [R]

On the way out the numbers say of which of the tokens each row is a copy (int32); on the way of a
gradient they are the rows' weights, and the receiver knows the copies from before. A copy, and a
product of the same two numbers, have the same bits wherever they are made.

T = tokens, D = dim, H = hosts, N = ranks on "ep", R = rows, U = tokens with a row on a host
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.comm.host_ways import Ways
from gangline.comm.mesh import Mesh
from gangline.comm.row_exchange import expect_blocks
from gangline.kernels.permute import Permutation

LONG_BYTES = 1024 * 1024


def take(x_TD: Tensor, tokens_R: Tensor, weights_R: Tensor | None, *, out: Tensor) -> None:
    """Copy each row's token, times the row's weight, to `out`."""
    torch.index_select(x_TD, 0, tokens_R, out=out)
    if weights_R is not None:
        out.mul_(weights_R.unsqueeze(-1))


def is_long(num_rows: int, like: Tensor) -> bool:
    """Tell whether a message between hosts is cut in two, so that passing on hides behind it."""
    return num_rows * like.shape[1] * like.itemsize >= LONG_BYTES


class RowCrossing:
    """Send each row; one movement of it.

    A long message is cut in two: what the partner has to pass on, and then the partner's own rows,
    which cross while the others are passed on.
    """

    def __init__(
        self, ways: Ways, mesh: Mesh, op: str, passed_on: list[list[Tensor]], *, like: Tensor
    ) -> None:
        """Post the receives; `passed_on` is where rows are to lie: [near rank][source]."""
        self._ways, self._passed_on = ways, passed_on
        mine = ways.layout.mine.index(ways.layout.place)
        self._buffers: list[Tensor] = []
        first, second = ([like.new_empty(0)] * len(ways.home) for _ in range(2))
        for number, (source, per_near) in enumerate(ways.via_rows.items()):
            is_cut = is_long(sum(per_near), like)
            num_rows = sum(per_near) - is_cut * per_near[mine]
            first[source] = like.new_empty(num_rows, like.shape[1])
            self._buffers.append(first[source])
            if is_cut:
                second[source] = passed_on[mine][number]
        self._first = expect_blocks(first, mesh, "ep", op=op)
        self._second = expect_blocks(second, mesh, "ep", op=op)

    def send(self, x_TD: Tensor, token_of_row_R: Tensor, weights_R: Tensor | None) -> None:
        """Start to send the rows of these tokens."""
        ways = self._ways
        first, second = ([x_TD.new_empty(0)] * len(ways.home) for _ in range(2))
        for host, partner in ways.layout.partners.items():
            others = [place for place in ways.layout.members[host] if place != partner]
            tokens, partners = (
                ways.of_places(token_of_row_R, places) for places in (others, [partner])
            )
            rows = x_TD.new_empty(len(tokens) + len(partners), x_TD.shape[1])
            weights = None
            if weights_R is not None:
                parts = [ways.of_places(weights_R, places) for places in (others, [partner])]
                weights = torch.cat(parts)
            take(x_TD, torch.cat([tokens, partners]), weights, out=rows)
            end = len(tokens) if is_long(len(rows), x_TD) else len(rows)
            first[partner], second[partner] = rows[:end], rows[end:]
        self._handles = self._first.send(first), self._second.send(second)

    def land(self) -> None:
        """Wait for what is to be passed on, and lay it out."""
        self._handles[0].wait()
        ways = self._ways
        mine = ways.layout.mine.index(ways.layout.place)
        others = [index for index in range(len(ways.layout.mine)) if index != mine]
        for number, per_near in enumerate(ways.via_rows.values()):
            start, rows = 0, self._buffers[number]
            # Cut, or with the own rows at the end.
            for near in others if len(rows) < sum(per_near) else [*others, mine]:
                end = start + per_near[near]
                self._passed_on[near][number].copy_(rows[start:end])
                start = end

    def land_rest(self) -> None:
        """Wait for what stays here."""
        self._handles[1].wait()


@dataclass(frozen=True)
class Copies:
    """Of which token each row is a copy."""

    number_of_row_R: Tensor  # int32, among the tokens with a row on the row's host
    tokens_H: Tensor  # int64, how many those are


def find_copies(
    plan: Permutation, rows_per_rank_N: Tensor, host_of_rank_N: Tensor, num_hosts: int
) -> Copies:
    """Number the tokens that go to each host, in their order; does not wait for the device."""
    num_tokens, num_rows = plan.row_of_choice_TK.shape[0], plan.token_of_row_R.shape[0]
    host_of_row_R = host_of_rank_N.repeat_interleave(rows_per_rank_N, output_size=num_rows)
    cell_of_row_R = host_of_row_R * num_tokens + plan.token_of_row_R
    goes = torch.zeros(num_hosts * num_tokens, dtype=torch.bool, device=cell_of_row_R.device)
    goes_HT = goes.index_fill_(0, cell_of_row_R, True).view(num_hosts, num_tokens)
    number_HT = goes_HT.cumsum(1, dtype=torch.int32) - 1
    return Copies(number_HT.flatten()[cell_of_row_R], goes_HT.sum(1))


@dataclass(frozen=True)
class Parcel:
    """One message, and its two parts as views."""

    message: Tensor  # uint8
    tokens_UD: Tensor
    of_rows_R: Tensor

    @classmethod
    def empty(
        cls, num_tokens: int, num_rows: int, *, tokens_TD: Tensor, of_rows: Tensor
    ) -> "Parcel":
        """Make room for tokens and for a number per row, of the types of these."""
        dim, unit = tokens_TD.shape[1], of_rows.itemsize
        end_of_tokens = num_tokens * dim * tokens_TD.itemsize
        start = -(-end_of_tokens // unit) * unit
        end = start + num_rows * unit
        message = torch.empty(end, dtype=torch.uint8, device=tokens_TD.device)
        tokens = message[:end_of_tokens].view(tokens_TD.dtype).view(num_tokens, dim)
        return cls(message, tokens, message[start:].view(of_rows.dtype))


class TokenCopies:
    """Know the tokens of every host's rows, from one movement of a plan to the next."""

    def __init__(self, plan: Permutation, copies: Copies, ways: Ways) -> None:
        self.number_of_row_R = copies.number_of_row_R
        self.tokens_to: dict[int, Tensor] = {}  # per host
        self.copied_from: dict[int, Tensor] = {}  # per source: of which token each row is a copy
        for host in ways.layout.partners:
            # Rows of one token write the same.
            members = ways.layout.members[host]
            tokens_R = ways.of_places(plan.token_of_row_R, members)
            numbers_R = ways.of_places(copies.number_of_row_R, members).long()
            tokens_U = tokens_R.new_empty(ways.tokens_to[host])
            self.tokens_to[host] = tokens_U.scatter_(0, numbers_R, tokens_R)


class TokenCrossing:
    """Send each token once to a host, and let the partner there copy and weigh; one movement."""

    def __init__(
        self,
        copies: TokenCopies,
        ways: Ways,
        mesh: Mesh,
        op: str,
        passed_on: list[list[Tensor]],
        *,
        like: Tensor,
        weights_R: Tensor | None,
    ) -> None:
        """Post the receives; with weights of a gradient's rows, else of what they are copies."""
        self._copies, self._ways, self._passed_on = copies, ways, passed_on
        self._is_gradient = weights_R is not None
        self._of_rows_R = copies.number_of_row_R if weights_R is None else weights_R
        self._nothing = [like.new_empty(0, dtype=torch.uint8)] * len(ways.home)
        self._parcels = {
            source: self._parcel(ways.tokens_from[source], sum(per_near), like)
            for source, per_near in ways.via_rows.items()
        }
        incoming = list(self._nothing)
        for source, parcel in self._parcels.items():
            incoming[source] = parcel.message
        self._expected = expect_blocks(incoming, mesh, "ep", op=op)

    def send(self, x_TD: Tensor, token_of_row_R: Tensor, weights_R: Tensor | None) -> None:
        """Start to send these tokens."""
        outgoing = list(self._nothing)
        for host, partner in self._ways.layout.partners.items():
            tokens = self._copies.tokens_to[host]
            of_rows = self._ways.of_places(self._of_rows_R, self._ways.layout.members[host])
            parcel = self._parcel(len(tokens), len(of_rows), x_TD)
            torch.index_select(x_TD, 0, tokens, out=parcel.tokens_UD)
            parcel.of_rows_R.copy_(of_rows)
            outgoing[partner] = parcel.message
        self._handle = self._expected.send(outgoing)

    def land(self) -> None:
        """Wait for the tokens, and copy them to their rows."""
        self._handle.wait()
        for number, (source, parcel) in enumerate(self._parcels.items()):
            if not self._is_gradient:
                # Copied out of the message, so that the tokens beside it can go.
                self._copies.copied_from[source] = parcel.of_rows_R.clone()
            per_near = self._ways.via_rows[source]
            copied = self._copies.copied_from[source].split(per_near)
            of_rows = parcel.of_rows_R.split(per_near)
            for near, numbers, weights in zip(self._passed_on, copied, of_rows, strict=True):
                weigh = weights if self._is_gradient else None
                take(parcel.tokens_UD, numbers, weigh, out=near[number])

    def land_rest(self) -> None:
        """Do nothing: a token is for several ranks, so all are waited for at once."""

    def _parcel(self, num_tokens: int, num_rows: int, like: Tensor) -> Parcel:
        return Parcel.empty(num_tokens, num_rows, tokens_TD=like, of_rows=self._of_rows_R)
