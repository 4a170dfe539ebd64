"""Bring tokens to the ranks that hold their experts, and the experts' results back.

    exchange = make("all_to_all")
    way = exchange.dispatch(x_TD, plan, mesh)
    y_TD = exchange.combine(experts.pieces(way, dtype), way, weights_TK)

The kinds differ in how rows travel, never in the result: each expert gets the rows of all ranks in
the order (source, token), each token's results are summed at home in the order of its choices, and
so outputs and all gradients are bit for bit those of one process that holds all experts and the
ranks' tokens one after the other.

kind           how rows travel
local          not at all: one rank has all experts
all_to_all     one message to each rank (token_exchange_flat.py)
chunked        the same in runs of experts, so that the next run travels while one is computed
all_gather     all tokens to all ranks (token_exchange_gather.py)
hierarchical   between hosts over one partner on each, then inside; can send a token once per host
               (token_exchange_hierarchical.py)

Read token_exchange_parts.py for what passes between exchange and experts, and
token_exchange_autograd.py for how forward and backward overlap.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from gangline.comm.mesh import Mesh
from gangline.comm.token_exchange_autograd import Carrier, come_home, depart
from gangline.comm.token_exchange_choice import Kind
from gangline.comm.token_exchange_flat import FlatCarrier
from gangline.comm.token_exchange_gather import GatherCarrier
from gangline.comm.token_exchange_hierarchical import HierarchicalCarrier
from gangline.comm.token_exchange_parts import Block, Piece, TokenExchange, Way
from gangline.kernels.permute import Permutation, permute, unpermute

__all__ = ["Block", "Piece", "TokenExchange", "Way", "make"]

DEFAULT_CHUNKS = 4


def make(kind: Kind, *, chunks: int | None = None, deduplicate: bool = False) -> TokenExchange:
    """Make the exchange of a kind; "auto" is for `token_exchange_choice.resolve` to settle.

    Raises: ValueError for a setting that the kind does not have.
    """
    if chunks is not None and kind != "chunked":
        raise ValueError(f"chunks is {chunks}, but {kind} has none; leave it out or take chunked")
    if deduplicate and kind != "hierarchical":
        raise ValueError(f"{kind} cannot deduplicate; leave it out or take hierarchical")
    if kind == "local":
        return LocalExchange()
    if kind == "auto":
        raise ValueError('kind is "auto"; make the kind that resolve() chooses')
    return CarriedExchange(kind, chunks=chunks or DEFAULT_CHUNKS, deduplicate=deduplicate)


@dataclass(frozen=True)
class LocalExchange:
    """Sort rows by expert, and nothing else; see TokenExchange."""

    kind: Kind = "local"

    def dispatch(self, x_TD: Tensor, plan: Permutation, mesh: Mesh) -> Way:
        """See TokenExchange."""
        if mesh.axis_size("ep") > 1:
            raise ValueError(
                f"experts are divided over {mesh.axis_size('ep')} ranks, which the local exchange "
                "does not reach; take another kind"
            )
        block = Block(0, permute(x_TD, plan), plan.rows_per_expert_E)
        return Way([[block]], (plan.rows_per_expert_E.shape[0],), plan)

    def combine(self, pieces: Iterator[Piece], way: Way, weights_TK: Tensor) -> Tensor:
        """See TokenExchange."""
        (piece,) = pieces
        return unpermute(piece.values_QC, weights_TK, way.trip)


@dataclass(frozen=True)
class CarriedExchange:
    """Let a carrier of the kind bring rows over the axis "ep"; see TokenExchange."""

    kind: Kind
    chunks: int  # of chunked
    deduplicate: bool  # of hierarchical

    def dispatch(self, x_TD: Tensor, plan: Permutation, mesh: Mesh) -> Way:
        """See TokenExchange."""
        return depart(x_TD, plan, self.carrier(plan, mesh))

    def combine(self, pieces: Iterator[Piece], way: Way, weights_TK: Tensor) -> Tensor:
        """See TokenExchange."""
        return come_home(pieces, way, weights_TK)

    def carrier(self, plan: Permutation, mesh: Mesh) -> Carrier:
        """Tell the ranks how many rows will come, and plan the ways of this rank's."""
        if self.kind == "all_gather":
            return GatherCarrier(plan, mesh)
        if self.kind == "hierarchical":
            return HierarchicalCarrier(plan, mesh, deduplicate=self.deduplicate)
        return FlatCarrier(plan, mesh, num_chunks=self.chunks if self.kind == "chunked" else 1)
