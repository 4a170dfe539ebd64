"""Broadcast and reduce along a chain of ranks, chunk by chunk, by point-to-point messages.

For gloo, whose own ways are a tree (the root's link carries the tensor log2 N times) and a
reduce-scatter followed by a gather (2 (N-1)/N times). On a chain every link carries the tensor
once, and a rank sends on a chunk while it receives the next: S/B + (N-2) c/B for S bytes in chunks
of c at bandwidth B.

The chain starts at the root and follows the order of the axis. A rank passes chunks on inside
`wait`, so whoever starts one must wait for it, and every rank in the same order.

N = ranks on the axis
"""

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gangline.comm.handle import Call, Handle
from gangline.comm.mesh import AXES, Axis, Mesh

ChainOp = Literal["sum", "prod", "max", "min"]

MERGE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": Tensor.add_,
    "prod": Tensor.mul_,
    "max": lambda into, other: torch.maximum(into, other, out=into),
    "min": lambda into, other: torch.minimum(into, other, out=into),
}
# A chunk costs about 0.1 ms of a core on its way; the chain fills in N-2 chunks.
_MIN_CHUNK_BYTES = 128 << 10
_MAX_CHUNK_BYTES = 1 << 20
_NUM_CHUNKS_WANTED = 32


def chain_broadcast(tensor: Tensor, mesh: Mesh, axis: str, *, root: int) -> Handle:
    """Copy the tensor of place `root` on the axis to all, in place.

    Shapes: [...], contiguous, the same on every rank.
    Communicates: the tensor's bytes once over each link of the chain.
    """
    along, call = _begin("broadcast", mesh, axis)
    if along.group is None:
        return Handle(call)
    before, behind = _neighbours(along, root)
    chunks = _chunks(tensor, along.size)
    tag = len(AXES) + call.sequence  # those below are of the axes
    if before is None:  # the root, which need not wait for anything to start
        return Handle(call, _send_all(call, chunks, behind, tag))
    incoming = _receive_all(call, chunks, before, tag)

    def pass_on() -> None:
        sends = []
        for work, chunk in zip(incoming, chunks, strict=True):
            work.wait()
            if behind is not None:
                sends.append(_send(call, chunk, behind, tag))
        for send in sends:
            send.wait()

    return Handle(call, finish=lambda: call.guard(pass_on))


def chain_reduce(
    tensor: Tensor, out: Tensor, mesh: Mesh, axis: str, *, root: int, op: ChainOp = "sum"
) -> Handle:
    """Reduce over the axis into `out` of place `root`.

    Shapes: both [...], contiguous, the same on every rank. `tensor` may be `out`, and is else left
    as it is; `out` of the other ranks is not touched.
    Communicates: the tensor's bytes once over each link of the chain.
    Guarantees: the ranks' values are merged from the far end of the chain to the root, in the
    tensor's type.
    """
    along, call = _begin("reduce", mesh, axis)
    if along.group is None:
        if out.data_ptr() != tensor.data_ptr():
            out.copy_(tensor)
        return Handle(call)
    behind, before = _neighbours(along, root)  # the chain of the broadcast, walked backwards
    tag = len(AXES) + call.sequence  # those below are of the axes
    own = _chunks(tensor, along.size)
    if before is None:  # the far end
        return Handle(call, _send_all(call, own, behind, tag))
    received = _chunks(torch.empty_like(tensor), along.size)
    incoming = _receive_all(call, received, before, tag)
    targets = _chunks(out, along.size) if behind is None else received

    def merge_and_pass_on() -> None:
        sends = []
        for work, chunk, mine, target in zip(incoming, received, own, targets, strict=True):
            work.wait()
            MERGE[op](chunk, mine)
            if behind is not None:
                sends.append(_send(call, chunk, behind, tag))
            else:
                target.copy_(chunk)
        for send in sends:
            send.wait()

    return Handle(call, finish=lambda: call.guard(merge_and_pass_on))


def _begin(op: str, mesh: Mesh, axis: str) -> tuple[Axis, Call]:
    along = mesh.axes[axis]
    return along, Call(op, along, mesh, mesh.next_sequence(axis), time.monotonic())


def _neighbours(axis: Axis, root: int) -> tuple[int | None, int | None]:
    """Return the places before and behind this rank on the chain that starts at the root."""
    place = (axis.index - root) % axis.size
    before = (axis.index - 1) % axis.size if place > 0 else None
    behind = (axis.index + 1) % axis.size if place < axis.size - 1 else None
    return before, behind


def _chunks(tensor: Tensor, num_ranks: int) -> tuple[Tensor, ...]:
    size = _MAX_CHUNK_BYTES
    if num_ranks > 2:  # else nothing is passed on
        size = min(max(tensor.nbytes // _NUM_CHUNKS_WANTED, _MIN_CHUNK_BYTES), size)
    chunks: tuple[Tensor, ...] = tensor.flatten().split(max(size // tensor.element_size(), 1))
    return chunks


def _receive_all(call: Call, chunks: tuple[Tensor, ...], source: int, tag: int) -> list[dist.Work]:
    def post() -> list[dist.Work]:
        # The tag keeps messages apart that other operations on the axis sent meanwhile.
        posted = [
            dist.irecv(chunk, group=call.axis.group, group_src=source, tag=tag) for chunk in chunks
        ]
        return [work for work in posted if work is not None]

    received: list[dist.Work] = call.guard(post)
    return received


def _send_all(call: Call, chunks: tuple[Tensor, ...], to: int | None, tag: int) -> list[dist.Work]:
    sent: list[dist.Work] = call.guard(lambda: [_send(call, chunk, to, tag) for chunk in chunks])
    return sent


def _send(call: Call, chunk: Tensor, to: int | None, tag: int) -> dist.Work:
    assert to is not None, "only who has a successor sends"
    call.mesh.traffic.count(call.axis.link_to(to), chunk.nbytes)
    work = dist.isend(chunk, group=call.axis.group, group_dst=to, tag=tag)
    assert work is not None, "this rank is on the axis"
    return work
