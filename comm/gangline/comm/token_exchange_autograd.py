"""Tie the movements of rows into autograd, so that forward and backward overlap alike.

Rows make the same round trip twice, in the forward as tokens and results, in the backward as
gradients of results and of tokens: out to the experts, and back to their place at home. A movement
is cut into a node that starts it and a node that waits for it:

    forward                               backward, in reverse
    Depart   tokens leave                 ... rows are home: sum those of each token
    Arrive   a block's rows are there     ... its gradients leave for home
             experts
    Return   a block's results leave      ... its gradients are there
    Home     weigh and sum                ... gradients leave for the experts

Between start and wait other nodes run: with several blocks, Arrive, experts and Return of one
while the next is on its way. Autograd runs nodes in the reverse order of their making, so the
backward overlaps in the same manner without a word about it. Nodes are joined by tensors without
elements; rows and handles pass through the `Journey`.

T = tokens, K = choices, D = dim, R = rows of this rank's tokens, Q = rows of a block
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gangline.comm.token_exchange_parts import Block, Piece, Way
from gangline.kernels.permute import Permutation, sum_rows, weight_gradients, weights_of_rows


class Trip(Protocol):
    """One round trip of rows, under way. Each block arrives once and is sent back once."""

    def arrive(self, block: int) -> Tensor:
        """Wait for a block at its experts; return [Q, D] sorted by expert."""
        ...

    def send_back(self, block: int, rows_QD: Tensor) -> None:
        """Start to send a block's rows home."""
        ...

    def come_home(self) -> Tensor:
        """Wait for all blocks' rows; return [R, D] in the order of the plan."""
        ...


class Carrier(Protocol):
    """Know the way of each row between one plan's tokens and their experts."""

    rows_per_expert: list[Tensor]  # per block, int64 [L]: what the experts get
    experts_per_group: tuple[int, ...]

    def leave(self, x_TD: Tensor, weights_R: Tensor | None, direction: "Direction") -> Trip:
        """Start a round trip: send each row's token (times the row's weight) to its expert."""
        ...


@dataclass(frozen=True)
class Direction:
    """What errors call the two movements of a trip, and in which order blocks are wanted."""

    out: str
    back: str
    last_block_first: bool


FORWARD = Direction("dispatch", "combine", last_block_first=False)
BACKWARD = Direction("combine backward", "dispatch backward", last_block_first=True)


@dataclass
class Journey:
    """A layer's two trips, of which one at a time is under way."""

    plan: Permutation
    carrier: Carrier
    trip: Trip | None = None


def depart(x_TD: Tensor, plan: Permutation, carrier: Carrier) -> Way:
    """Start all blocks on their way to the experts."""
    journey = Journey(plan, carrier)
    apply: Callable[..., tuple[Tensor, ...]] = _Depart.apply
    tokens = apply(x_TD, journey)

    def group(block: int, token: Tensor) -> Iterator[Block]:
        arrive: Callable[..., Tensor] = _Arrive.apply
        yield Block(block, arrive(token, journey, block), carrier.rows_per_expert[block])

    groups = (group(block, token) for block, token in enumerate(tokens))
    return Way(groups, carrier.experts_per_group, journey)


def come_home(pieces: Iterator[Piece], way: Way, weights_TK: Tensor) -> Tensor:
    """Send each piece home as it comes, then weigh and sum."""
    leave: Callable[..., Tensor] = _Return.apply
    finish: Callable[..., Tensor] = _Home.apply
    tokens = [leave(piece.values_QC, way.trip, piece.block.index) for piece in pieces]
    return finish(weights_TK, way.trip, *tokens)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, journey: Journey) -> tuple[Tensor, ...]:
        ctx.journey = journey
        carrier = journey.carrier
        journey.trip = carrier.leave(x_TD.contiguous(), None, FORWARD)
        return tuple(x_TD.new_empty(0) for _ in carrier.rows_per_expert)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        rows_RD = ctx.journey.trip.come_home()
        ctx.journey.trip = None
        return sum_rows(rows_RD, ctx.journey.plan), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, journey: Journey, block: int) -> Tensor:
        ctx.journey, ctx.block = journey, block
        assert journey.trip is not None, "tokens have left"
        return journey.trip.arrive(block)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.journey.trip.send_back(ctx.block, grads[0].contiguous())
        return grads[0].new_empty(0), None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_QD: Tensor, journey: Journey, block: int) -> Tensor:
        ctx.journey, ctx.block = journey, block
        assert journey.trip is not None, "tokens have left"
        journey.trip.send_back(block, rows_QD.contiguous())
        return rows_QD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        return ctx.journey.trip.arrive(ctx.block), None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, journey: Journey, *tokens: Tensor) -> Tensor:
        ctx.journey, ctx.num_tokens = journey, len(tokens)
        assert journey.trip is not None, "tokens have left"
        rows_RD = journey.trip.come_home()
        journey.trip = None
        ctx.save_for_backward(rows_RD, weights_TK)
        return sum_rows(rows_RD, journey.plan, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weights_TK = ctx.saved_tensors
        journey, dy_TD = ctx.journey, grads[0].contiguous()
        tokens: list[Tensor | None] = [None] * ctx.num_tokens
        if any(ctx.needs_input_grad[2:]):
            weights_R = weights_of_rows(weights_TK, journey.plan, rows_RD.dtype)
            journey.trip = journey.carrier.leave(dy_TD, weights_R, BACKWARD)
            tokens = [dy_TD.new_empty(0) for _ in tokens]
        dweights = None
        if ctx.needs_input_grad[0]:  # while the rows travel
            dweights = weight_gradients(rows_RD, dy_TD, weights_TK, journey.plan)
        return dweights, None, *tokens
