"""Bring token rows to the ranks that hold their experts, and back.

Data flow, with N = ranks on "ep" and E / N experts on each:

    rows sorted by expert  --all_to_all-->  by (source, expert)  --reorder-->  by (expert, source)
    experts run on their rows                                    <--combine--  the same way back

Each rank's rows keep their order, so an expert sees the rows of all ranks exactly as one process
would that held the ranks' tokens one after the other: the result is bit for bit the same.
What comes out of `dispatch` goes into `combine`.

R = rows of this rank, Q = rows of this rank's experts, E = experts, L = local experts, D = dim
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.comm.collectives import all_to_all, exchange_counts
from gangline.comm.mesh import Mesh
from gangline.kernels.permute import take_rows


@dataclass(frozen=True)
class Dispatched:
    """Remember the way that rows came, for `combine`."""

    mesh: Mesh
    rows_per_expert_L: Tensor  # int64, of this rank's experts, sums to Q
    send_rows: list[int]  # per rank of "ep"
    recv_rows: list[int]
    order_Q: Tensor | None  # (expert, source) order from (source, expert); None = the same
    inverse_Q: Tensor | None


def dispatch(rows_RD: Tensor, rows_per_expert_E: Tensor, mesh: Mesh) -> tuple[Tensor, Dispatched]:
    """Send each row to the rank of its expert; return this rank's experts' rows, by expert.

    Differentiable. Any number of rows, also none, on any rank.

    Shapes: rows_RD [R, D], sorted by expert; rows_per_expert_E [E] int64; returns [Q, D].
    Communicates: over "ep", the counts (one small message per pair), then the rows. On one rank
    nothing, and the rows come out as they went in.
    """
    num_ranks = mesh.axis_size("ep")
    if num_ranks == 1:
        way = Dispatched(
            mesh, rows_per_expert_E, [rows_RD.shape[0]], [rows_RD.shape[0]], None, None
        )
        return rows_RD, way
    counts_NL = rows_per_expert_E.view(num_ranks, -1)
    incoming_NL = exchange_counts(counts_NL, mesh, "ep")
    # The one wait for the device: the sizes of what is sent and received.
    send_rows, recv_rows = torch.stack([counts_NL.sum(1), incoming_NL.sum(1)]).tolist()
    received = all_to_all(rows_RD, send_rows, recv_rows, mesh, "ep")
    order = inverse = None
    if incoming_NL.shape[1] > 1:
        order = _expert_major(incoming_NL, sum(recv_rows))
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        received = take_rows(received, order, inverse)
    return received, Dispatched(mesh, incoming_NL.sum(0), send_rows, recv_rows, order, inverse)


def combine(rows_QD: Tensor, way: Dispatched) -> Tensor:
    """Send the experts' rows back to where their tokens came from.

    Differentiable.

    Shapes: rows_QD [Q, D], as `dispatch` ordered them; returns [R, D], as it got them.
    Communicates: over "ep", the rows.
    """
    if way.mesh.axis_size("ep") == 1:
        return rows_QD
    if way.order_Q is not None and way.inverse_Q is not None:
        rows_QD = take_rows(rows_QD, way.inverse_Q, way.order_Q)
    return all_to_all(rows_QD, way.recv_rows, way.send_rows, way.mesh, "ep")


def _expert_major(counts_NL: Tensor, num_rows: int) -> Tensor:
    """Return the order that takes rows from (source, expert) to (expert, source)."""
    flat = counts_NL.flatten()
    starts_NL = (flat.cumsum(0) - flat).view_as(counts_NL)
    lengths = counts_NL.t().flatten()
    # Row j of the result lies in some block; it is that block's start there plus j's place in it.
    shift = starts_NL.t().flatten() - (lengths.cumsum(0) - lengths)
    blocks = shift.repeat_interleave(lengths, output_size=num_rows)
    return blocks + torch.arange(num_rows, device=flat.device)
