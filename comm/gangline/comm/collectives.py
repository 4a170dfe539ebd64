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
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gangline.comm.errors import CommAbortedError, CommError
from gangline.comm.handle import Call, Handle
from gangline.comm.mesh import Axis, Mesh

__all__ = [
    "CommError",
    "Handle",
    "all_gather",
    "all_gather_into",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "exchange_counts",
    "exchange_json",
    "exchange_rows",
    "recv",
    "reduce_scatter",
    "send",
]

ReduceOp = Literal["sum", "min", "max"]
# gloo wraps each message in its source line and general advice.
_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


def all_reduce(tensor: Tensor, mesh: Mesh, axis: str, *, op: ReduceOp = "sum") -> Handle:
    """Reduce over the axis, in place.

    Communicates: a ring, 2 (N-1)/N of the tensor's bytes per rank.
    """
    along = mesh.axes[axis]
    return _start(
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
        handle = _start("reduce_scatter", along, mesh, list)
        out_C.copy_(tensor_NC[0])
        return handle
    if tensor_NC.device.type == "cuda":
        return _start(
            "reduce_scatter",
            along,
            mesh,
            lambda: dist.reduce_scatter_tensor(out_C, tensor_NC, group=along.group, async_op=True),
        )
    received_NC = torch.empty_like(tensor_NC)
    rows = [1] * along.size

    def add_up() -> None:
        out_C.copy_(received_NC[0])
        for row in received_NC[1:]:
            out_C.add_(row)

    return _start_exchange(
        "reduce_scatter", tensor_NC, received_NC, rows, rows, along, mesh, finish=add_up
    )


def all_gather_into(out_NC: Tensor, tensor_C: Tensor, mesh: Mesh, axis: str) -> Handle:
    """Gather the tensors of all ranks into the rows of `out_NC`, in the order of the axis.

    Shapes: tensor_C [...], the same on every rank; out_NC [N, ...]; both contiguous. tensor_C may
    be this rank's own row of out_NC.
    Communicates: a ring, (N-1)/N of out_NC's bytes per rank.
    """
    along = mesh.axes[axis]
    if along.group is None:
        handle = _start("all_gather", along, mesh, list)
        out_NC[0].copy_(tensor_C)
        return handle
    return _start(
        "all_gather",
        along,
        mesh,
        lambda: dist.all_gather_into_tensor(
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
    _start(
        "all_gather",
        along,
        mesh,
        lambda: dist.all_gather(parts, contiguous, group=along.group, async_op=True),
    ).wait()
    return torch.stack(parts)


def broadcast(tensor: Tensor, mesh: Mesh, axis: str, *, root: int) -> Handle:
    """Copy the tensor of place `root` on the axis to all, in place."""
    along = mesh.axes[axis]
    return _start(
        "broadcast",
        along,
        mesh,
        lambda: dist.broadcast(tensor, group=along.group, group_src=root, async_op=True),
    )


def send(tensor: Tensor, mesh: Mesh, axis: str, *, to: int) -> Handle:
    """Send a contiguous tensor to place `to` of the axis, which must call `recv`.

    Communicates: one message. Between two ranks messages arrive in the order of their sends.
    """
    along = mesh.axes[axis]
    mesh.traffic.count(along.link_to(to), tensor.nbytes)
    return _start("send", along, mesh, lambda: dist.isend(tensor, group=along.group, group_dst=to))


def recv(tensor: Tensor, mesh: Mesh, axis: str, *, source: int) -> Handle:
    """Receive a contiguous tensor from place `source` of the axis, which must call `send`."""
    along = mesh.axes[axis]
    return _start(
        "recv", along, mesh, lambda: dist.irecv(tensor, group=along.group, group_src=source)
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


def exchange_counts(counts_NC: Tensor, mesh: Mesh, axis: str) -> Tensor:
    """Send row i to place i of the axis and return what came from each, in order.

    Shapes: counts_NC [N, C], any dtype, the same C on all ranks; returns [N, C].
    """
    along = mesh.axes[axis]
    flat = counts_NC.contiguous()
    received = torch.empty_like(flat)
    rows = [1] * along.size
    _start_exchange("exchange_counts", flat, received, rows, rows, along, mesh).wait()
    return received


def exchange_rows(
    x: Tensor,
    received: Tensor,
    send_rows: Sequence[int],
    recv_rows: Sequence[int],
    mesh: Mesh,
    axis: str,
    *,
    op: str = "exchange_rows",
) -> Handle:
    """Start to send consecutive blocks of rows to the ranks of the axis and to receive theirs.

    A rank may send and receive nothing. Both tensors are contiguous, and not touched until `wait`.
    Not differentiable; `all_to_all` is.

    Shapes: x [sum(send_rows), ...], received [sum(recv_rows), ...].
    Communicates: the rows that leave this rank, once; counted in `mesh.traffic`.
    """
    return _start_exchange(op, x, received, send_rows, recv_rows, mesh.axes[axis], mesh)


def all_to_all(
    x: Tensor, send_rows: Sequence[int], recv_rows: Sequence[int], mesh: Mesh, axis: str
) -> Tensor:
    """Send consecutive blocks of rows to the ranks of the axis; return theirs, in order.

    Differentiable: the gradient takes the way back. A rank may send and receive nothing.

    Shapes: x [sum(send_rows), ...]; returns [sum(recv_rows), ...].
    Communicates: the rows that leave this rank, once. On gloo as one message per pair, because its
    all_to_all swings between half and full duplex; one all_to_all_single on NCCL.
    """
    apply: Callable[..., Tensor] = _AllToAll.apply
    return apply(x, send_rows, recv_rows, mesh, mesh.axes[axis])


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        send_rows: Sequence[int],
        recv_rows: Sequence[int],
        mesh: Mesh,
        axis: Axis,
    ) -> Tensor:
        ctx.way = (send_rows, recv_rows, mesh, axis)
        received = x.new_empty((sum(recv_rows), *x.shape[1:]))
        _start_exchange(
            "all_to_all", x.contiguous(), received, send_rows, recv_rows, axis, mesh
        ).wait()
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        send_rows, recv_rows, mesh, axis = ctx.way
        sent = grad.new_empty((sum(send_rows), *grad.shape[1:]))
        _start_exchange(
            "all_to_all backward", grad.contiguous(), sent, recv_rows, send_rows, axis, mesh
        ).wait()
        return sent, None, None, None, None


def _start_exchange(
    op: str,
    x: Tensor,
    received: Tensor,
    send_rows: Sequence[int],
    recv_rows: Sequence[int],
    axis: Axis,
    mesh: Mesh,
    *,
    finish: Callable[[], None] | None = None,
) -> Handle:
    outgoing, incoming = x.split(list(send_rows)), received.split(list(recv_rows))
    for place, block in enumerate(outgoing):
        if send_rows[place]:
            mesh.traffic.count(axis.link_to(place), block.nbytes)
    if x.device.type == "cuda" and axis.group is not None:
        send, recv = list(send_rows), list(recv_rows)
        return _start(
            op,
            axis,
            mesh,
            lambda: dist.all_to_all_single(
                received, x, recv, send, group=axis.group, async_op=True
            ),
            finish=finish,
        )
    incoming[axis.index].copy_(outgoing[axis.index])

    def post() -> list[dist.Work | None]:
        # In rotation, so that no rank is everybody's first target. Both sides know the counts,
        # so an empty block is not sent.
        turns = [(axis.index + turn) % axis.size for turn in range(1, axis.size)]
        receives = [
            dist.irecv(incoming[peer], group=axis.group, group_src=peer)
            for peer in turns
            if recv_rows[peer]
        ]
        sends = [
            dist.isend(outgoing[peer], group=axis.group, group_dst=peer)
            for peer in turns
            if send_rows[peer]
        ]
        return receives + sends

    return _start(op, axis, mesh, post, finish=finish)


def _start(
    op: str,
    axis: Axis,
    mesh: Mesh,
    post: Callable[[], Any],
    *,
    finish: Callable[[], None] | None = None,
) -> Handle:
    call = Call(op, axis, mesh, mesh.next_sequence(axis.name), time.monotonic())
    if axis.group is None:
        if axis.size > 1:
            raise call.error(CommAbortedError, "the mesh was left")
        return Handle(call, finish=finish)
    posted = call.guard(post)
    return Handle(call, posted if isinstance(posted, list) else [posted], finish=finish)
