"""What ranks say to each other. The only callers of torch.distributed's collectives.

Every function names the mesh and the axis. On an axis of one rank nothing is sent, and the result
is what the formula gives for one rank. A peer's death, hang or departure surfaces as a CommError
(tree in errors.py); a rank that sees one aborts its mesh, so that the ranks that wait for it, and
those that wait for them, see one within milliseconds, too.

Sums over ranks are bit-identical on every rank of the axis (gloo and NCCL reduce each element at
one place), but depend on the number of ranks.

N = ranks on the axis, R = rows, ... = any further dims
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gangline.comm.errors import CommAbortedError, CommError, CommTimeoutError, PeerLostError
from gangline.comm.mesh import Axis, Mesh

__all__ = [
    "CommError",
    "Handle",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "exchange_counts",
    "exchange_json",
]

ReduceOp = Literal["sum", "min", "max"]
# gloo wraps each message in its source line and general advice.
_GLOO_NOISE = re.compile(r"^\[\S+\.cc:\d+\] | This is typically caused by .*$")
_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


class Handle:
    """Stand for an operation under way; its tensors may be touched after `wait`."""

    def __init__(self, op: str, axis: Axis, mesh: Mesh, works: Sequence[dist.Work] = ()) -> None:
        self._op = op
        self._axis = axis
        self._mesh = mesh
        self._works = works
        self._started = time.monotonic()

    def wait(self) -> None:
        """Wait until the operation is complete (on CUDA: until the stream may go on).

        Raises: CommError; the mesh is aborted then.
        """
        for work in self._works:
            _guard(self._op, self._axis, self._mesh, work.wait, started=self._started)
        self._works = ()


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
    _exchange_rows("exchange_counts", flat, received, rows, rows, along, mesh)
    return received


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
        _exchange_rows("all_to_all", x.contiguous(), received, send_rows, recv_rows, axis, mesh)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        send_rows, recv_rows, mesh, axis = ctx.way
        sent = grad.new_empty((sum(send_rows), *grad.shape[1:]))
        _exchange_rows(
            "all_to_all backward", grad.contiguous(), sent, recv_rows, send_rows, axis, mesh
        )
        return sent, None, None, None, None


def _exchange_rows(
    op: str,
    x: Tensor,
    received: Tensor,
    send_rows: Sequence[int],
    recv_rows: Sequence[int],
    axis: Axis,
    mesh: Mesh,
) -> None:
    if x.device.type == "cuda" and axis.group is not None:
        send, recv = list(send_rows), list(recv_rows)
        _start(
            op,
            axis,
            mesh,
            lambda: dist.all_to_all_single(
                received, x, recv, send, group=axis.group, async_op=True
            ),
        ).wait()
        return
    outgoing, incoming = x.split(list(send_rows)), received.split(list(recv_rows))
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

    _start(op, axis, mesh, post).wait()


def _start(op: str, axis: Axis, mesh: Mesh, post: Callable[[], Any]) -> Handle:
    if axis.group is None:
        if axis.size > 1:
            raise CommAbortedError(
                op=op, axis=axis.name, rank=mesh.rank, elapsed_s=0.0, detail="the mesh was left"
            )
        return Handle(op, axis, mesh)
    posted = _guard(op, axis, mesh, post, started=time.monotonic())
    return Handle(op, axis, mesh, posted if isinstance(posted, list) else [posted])


def _guard(op: str, axis: Axis, mesh: Mesh, call: Callable[[], Any], *, started: float) -> Any:
    try:
        return call()
    except RuntimeError as error:  # torch has one class for all that can happen here
        text = _GLOO_NOISE.sub("", str(error).split("\n", 1)[0])
        kind: type[CommError] = PeerLostError
        if mesh.is_aborted:
            kind, text = CommAbortedError, "this rank's mesh was aborted"
        elif "imed out" in text or "timeout" in text.lower():
            kind = CommTimeoutError
            text = f"no answer within {mesh.timeout_s} s ({text})"
        mesh.abort()
        raise kind(
            op=op,
            axis=axis.name,
            rank=mesh.rank,
            elapsed_s=time.monotonic() - started,
            detail=text,
        ) from error
