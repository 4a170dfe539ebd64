"""What ranks say to each other. The only callers of torch.distributed's collectives.

Every function names the mesh and the axis. On an axis of one rank nothing is sent, and the result
is what the formula gives for one rank. A peer's death, hang or departure surfaces as a CommError
(tree in errors.py); a rank that sees one aborts its mesh, so that the ranks that wait for it, and
those that wait for them, see one within milliseconds, too.

Sums over ranks are bit-identical on every rank of the axis (gloo and NCCL reduce each element at
one place), but depend on the number of ranks.

On gloo, whatever goes from one rank to one other goes as a message of its own between the two:
gloo's all_to_all swings between half and full duplex, and its reduce_scatter is an all-reduce
inside, of twice the bytes.

N = ranks on the axis, R = rows, ... = any further dims
"""

import json
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gangline.comm.errors import CommError
from gangline.comm.handle import Handle, start
from gangline.comm.mesh import AXES, Mesh
from gangline.comm.row_exchange import (
    all_to_all,
    exchange_blocks,
    exchange_counts,
    exchange_rows,
    expect_blocks,
)

__all__ = [
    "CommError",
    "Handle",
    "all_gather",
    "all_gather_into",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "exchange_blocks",
    "exchange_counts",
    "exchange_json",
    "exchange_rows",
    "expect_blocks",
    "recv",
    "reduce_scatter",
    "send",
]

ReduceOp = Literal["sum", "min", "max"]
_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


def all_reduce(tensor: Tensor, mesh: Mesh, axis: str, *, op: ReduceOp = "sum") -> Handle:
    """Reduce over the axis, in place.

    Communicates: a ring, 2 (N-1)/N of the tensor's bytes per rank.
    """
    along = mesh.axes[axis]
    return start(
        "all_reduce",
        along,
        mesh,
        lambda: dist.all_reduce(tensor, _REDUCE_OPS[op], group=along.group, async_op=True),
    )


def reduce_scatter(tensor_NC: Tensor, out_C: Tensor, mesh: Mesh, axis: str) -> Handle:
    """Sum over the axis and leave row i of the sum at place i.

    Shapes: tensor_NC [N, ...], contiguous, untouched until `wait`; out_C [...].
    Communicates: (N-1)/N of the tensor's bytes per rank.
    Guarantees: on gloo the ranks' rows are added in the order of the axis, in out_C's type.
    """
    along = mesh.axes[axis]
    if along.group is None:
        handle = start("reduce_scatter", along, mesh, list)
        out_C.copy_(tensor_NC[0])
        return handle
    if tensor_NC.device.type == "cuda":
        return start(
            "reduce_scatter",
            along,
            mesh,
            lambda: dist.reduce_scatter_single(out_C, tensor_NC, group=along.group, async_op=True),
        )
    received_NC = torch.empty_like(tensor_NC)

    def add_up() -> None:
        out_C.copy_(received_NC[0])
        for row in received_NC[1:]:
            out_C.add_(row)

    rows = tensor_NC.unbind(), received_NC.unbind()
    return exchange_blocks(*rows, mesh, axis, op="reduce_scatter", finish=add_up)


def all_gather_into(out_NC: Tensor, tensor_C: Tensor, mesh: Mesh, axis: str) -> Handle:
    """Gather the tensors of all ranks into the rows of `out_NC`, in the order of the axis.

    Shapes: tensor_C [...], the same on every rank; out_NC [N, ...]; both contiguous. tensor_C may
    be this rank's own row of out_NC.
    Communicates: a ring, (N-1)/N of out_NC's bytes per rank.
    """
    along = mesh.axes[axis]
    if along.group is None:
        handle = start("all_gather", along, mesh, list)
        out_NC[0].copy_(tensor_C)
        return handle
    return start(
        "all_gather",
        along,
        mesh,
        lambda: dist.all_gather_single(
            out_NC.flatten(), tensor_C.flatten(), group=along.group, async_op=True
        ),
    )


def all_gather(tensor: Tensor, mesh: Mesh, axis: str) -> Tensor:
    """Return the tensors of all ranks, stacked in the order of the axis.

    Shapes: the same [...] on every rank; returns [N, ...].
    """
    along = mesh.axes[axis]
    if along.group is None:
        return tensor.detach().clone().unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(along.size)]
    contiguous = tensor.detach().contiguous()
    start(
        "all_gather",
        along,
        mesh,
        lambda: dist.all_gather(parts, contiguous, group=along.group, async_op=True),
    ).wait()
    return torch.stack(parts)


def broadcast(tensor: Tensor, mesh: Mesh, axis: str, *, root: int) -> Handle:
    """Copy the tensor of place `root` on the axis to all, in place."""
    along = mesh.axes[axis]
    return start(
        "broadcast",
        along,
        mesh,
        lambda: dist.broadcast(tensor, group=along.group, group_src=root, async_op=True),
    )


def send(tensor: Tensor, mesh: Mesh, axis: str, *, to: int) -> Handle:
    """Send a contiguous tensor to place `to` of the axis, which must call `recv`.

    Communicates: one message. Between two ranks messages arrive in the order of their sends.
    """
    along, tag = mesh.axes[axis], AXES.index(axis)
    mesh.traffic.count(along.link_to(to), tensor.nbytes)
    return start(
        "send", along, mesh, lambda: dist.isend(tensor, group=along.group, group_dst=to, tag=tag)
    )


def recv(tensor: Tensor, mesh: Mesh, axis: str, *, source: int) -> Handle:
    """Receive a contiguous tensor from place `source` of the axis, which must call `send`."""
    along, tag = mesh.axes[axis], AXES.index(axis)
    return start(
        "recv",
        along,
        mesh,
        lambda: dist.irecv(tensor, group=along.group, group_src=source, tag=tag),
    )


def exchange_json(value: Any, mesh: Mesh, axis: str) -> list[Any]:
    """Return the JSON values of all ranks in the order of the axis. Small values, off the hot path.

    Communicates: two gathers on the CPU, padded to the longest.
    """
    along = mesh.axes[axis]
    text = json.dumps(value).encode()
    if along.group is None:
        return [json.loads(text)]
    lengths = all_gather(torch.tensor([len(text)]), mesh, axis).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = all_gather(padded, mesh, axis)
    return [
        json.loads(row[:length].numpy().tobytes())
        for row, length in zip(rows, lengths, strict=True)
    ]


def barrier(mesh: Mesh, axis: str) -> None:
    """Return when every rank of the axis has called."""
    all_reduce(torch.zeros(1), mesh, axis).wait()
