"""The values that pass between a token exchange and the experts.

    way = exchange.dispatch(x_TD, plan, mesh)         # tokens leave; only sizes are waited for
    pieces = experts.pieces(way, x_TD.dtype)          # lazy: takes a block, yields what comes of it
    y_TD = exchange.combine(pieces, way, weights_TK)  # pulls; each piece goes home as it comes

The experts' side is the same for every exchange:

    for group in way.groups:
        for block in group:                        # taking the next block waits for it, and only it
            first product and activation of block.rows_QD
        for each of way.num_column_splits runs of columns:
            for block of the group:
                second product, these columns only: yield Piece(block, columns, values)

Blocks of a group differ in rows and share their experts; groups share no expert. So an expert
whose rows come in one block multiplies them in one product, as one process would that held all
experts: this keeps results and gradients bit for bit the same. An exchange that cuts an expert's
rows into several blocks, or its columns into several splits, changes where sums are cut in two.

T = tokens, K = choices of a token, D = model dim, Q = rows of a block, L = local experts of the
group
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gangline.comm.mesh import Mesh
from gangline.kernels.permute import Permutation


@dataclass(frozen=True)
class Block:
    """Rows that arrived together."""

    index: int  # among the blocks of the way, from 0
    rows_QD: Tensor  # sorted by expert
    rows_per_expert_L: Tensor  # int64, sums to Q


@dataclass(frozen=True)
class Piece:
    """What the experts make of a block, or of it in some columns."""

    block: Block
    columns: slice
    values_QC: Tensor


@dataclass(frozen=True)
class Way:
    """What one dispatch gives to the experts, and to `combine` of the same exchange."""

    groups: Iterable[Iterable[Block]]  # to be gone through once
    experts_per_group: tuple[int, ...]  # runs of this rank's experts, in order
    trip: Any  # the exchange's own
    num_column_splits: int = 1


class TokenExchange(Protocol):
    """Bring tokens to the ranks of their experts over the axis "ep", and the results back.

    An exchange holds no state of a run: one object serves any number of layers and meshes. Every
    rank of the axis calls `dispatch`, takes all blocks, and calls `combine`, and so does autograd
    in the backward, with any number of tokens, also none. A lost peer surfaces as a CommError in
    whichever call waits for it, and in the backward.
    """

    @property
    def kind(self) -> str:
        """The name of this kind, as in the job file."""
        ...

    def dispatch(self, x_TD: Tensor, plan: Permutation, mesh: Mesh) -> Way:
        """Start to send each token to the ranks of its experts. Differentiable.

        Shapes: x_TD [T, D]; the plan's ids are global expert numbers, and rank e of the axis holds
        an equal run of them.
        """
        ...

    def combine(self, pieces: Iterator[Piece], way: Way, weights_TK: Tensor) -> Tensor:
        """Send what the experts return back to the tokens, and sum it by weight. Differentiable.

        Shapes: weights_TK [T, K]; returns [T, D] in the dtype of the rows.
        """
        ...
