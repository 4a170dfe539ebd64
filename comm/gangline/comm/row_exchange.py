"""Send each rank of an axis what is for it, and receive from each: the ragged exchanges.

On gloo one message per pair of ranks: gloo's all_to_all swings between half and full duplex. One
`all_to_all` on NCCL. Every message is counted in `mesh.traffic`.

Receives before sends: on gloo a message does not leave until its receiver has told the sender that
a receive is posted, and that word waits in the same connection behind whatever the receiver is
sending itself. On a link of 100 Mbit/s, 1 KiB for a rank that had posted 4 MiB in the other
direction arrived after 20 ms where its receive had been posted before those, and after 330 ms where
after. So `expect_blocks` posts receives long before there is anything to send.

N = ranks on the axis, R = rows, ... = any further dims
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gangline.comm.errors import CommAbortedError
from gangline.comm.handle import Call, Handle
from gangline.comm.mesh import AXES, Mesh


class ExpectedBlocks:
    """An exchange whose receives are posted; `send` starts the other half."""

    def __init__(self, call: Call, incoming: Sequence[Tensor]) -> None:
        self._call = call
        self._incoming = incoming
        self._receives: list[Any] = []
        self._on_gloo = can_expect(incoming[call.axis.index])
        if call.axis.group is None:
            if call.axis.size > 1:
                raise call.error(CommAbortedError, "the mesh was left")
        elif self._on_gloo:
            call.guard(self._post_receives)

    def send(
        self, outgoing: Sequence[Tensor], *, finish: Callable[[], None] | None = None
    ) -> Handle:
        """Start to send a tensor to each rank of the axis. To be called once.

        Shapes: N tensors, by place on the axis; contiguous and untouched until `wait`. That of
        this rank's own place may be the incoming one itself, which then is not copied.
        """
        axis, mesh = self._call.axis, self._call.mesh
        for place, block in enumerate(outgoing):
            if block.numel():
                mesh.traffic.count(axis.link_to(place), block.nbytes)
        own = self._incoming[axis.index]
        if own is not outgoing[axis.index]:
            own.copy_(outgoing[axis.index])
        works = []
        if axis.group is not None:
            post = self._post_sends if self._on_gloo else self._post_all
            works = self._call.guard(lambda: post(outgoing))
        return Handle(self._call, self._receives + works, finish=finish)

    def _turns(self) -> list[int]:
        # In rotation, so that no rank is everybody's first target.
        axis = self._call.axis
        return [(axis.index + turn) % axis.size for turn in range(1, axis.size)]

    def _tag(self) -> int:
        # Two axes of the same ranks share a group; with receives posted early, a message of one
        # could be taken for one of the other.
        return AXES.index(self._call.axis.name)

    def _post_receives(self) -> None:
        axis, tag = self._call.axis, self._tag()
        # Both sides know the sizes, so an empty block is not sent.
        self._receives = [
            dist.irecv(self._incoming[peer], group=axis.group, group_src=peer, tag=tag)
            for peer in self._turns()
            if self._incoming[peer].numel()
        ]

    def _post_sends(self, outgoing: Sequence[Tensor]) -> list[Any]:
        axis, tag = self._call.axis, self._tag()
        return [
            dist.isend(outgoing[peer], group=axis.group, group_dst=peer, tag=tag)
            for peer in self._turns()
            if outgoing[peer].numel()
        ]

    def _post_all(self, outgoing: Sequence[Tensor]) -> list[Any]:
        index = self._call.axis.index
        received, sent = list(self._incoming), list(outgoing)
        received[index] = sent[index] = sent[index].new_empty(0)  # copied already
        return [dist.all_to_all(received, sent, group=self._call.axis.group, async_op=True)]


def can_expect(tensor: Tensor) -> bool:
    """Tell whether it is of use to post receives early: NCCL posts both halves at once."""
    return tensor.device.type != "cuda"


def expect_blocks(
    incoming: Sequence[Tensor], mesh: Mesh, axis: str, *, op: str = "exchange_blocks"
) -> ExpectedBlocks:
    """Post the receives of an exchange before what is to be sent is there.

    One without elements is not received; the other side must not send it. All are contiguous and
    of one type. Between any two ranks, messages are received in the order in which they were sent.

    Shapes: N tensors, by place on the axis.
    """
    along = mesh.axes[axis]
    call = Call(op, along, mesh, mesh.next_sequence(axis), time.monotonic())
    return ExpectedBlocks(call, incoming)


def exchange_blocks(
    outgoing: Sequence[Tensor],
    incoming: Sequence[Tensor],
    mesh: Mesh,
    axis: str,
    *,
    op: str = "exchange_blocks",
    finish: Callable[[], None] | None = None,
) -> Handle:
    """Start to send a tensor to each rank of the axis and to receive one from each.

    Shapes: N tensors each way, by place on the axis; see `expect_blocks` and its `send`.
    Communicates: what leaves this rank, once.
    """
    return expect_blocks(incoming, mesh, axis, op=op).send(outgoing, finish=finish)


def exchange_counts(counts_NC: Tensor, mesh: Mesh, axis: str) -> Tensor:
    """Send row i to place i of the axis and return what came from each, in order.

    Shapes: counts_NC [N, C], any dtype, the same C on all ranks; returns [N, C].
    """
    flat = counts_NC.contiguous()
    received = torch.empty_like(flat)
    exchange_blocks(flat.unbind(), received.unbind(), mesh, axis, op="exchange_counts").wait()
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
    Communicates: the rows that leave this rank, once.
    """
    outgoing, incoming = x.split(list(send_rows)), received.split(list(recv_rows))
    return exchange_blocks(outgoing, incoming, mesh, axis, op=op)


def all_to_all(
    x: Tensor, send_rows: Sequence[int], recv_rows: Sequence[int], mesh: Mesh, axis: str
) -> Tensor:
    """Send consecutive blocks of rows to the ranks of the axis; return theirs, in order.

    Differentiable: the gradient takes the way back. A rank may send and receive nothing.

    Shapes: x [sum(send_rows), ...]; returns [sum(recv_rows), ...].
    Communicates: the rows that leave this rank, once.
    """
    apply: Callable[..., Tensor] = _AllToAll.apply
    return apply(x, send_rows, recv_rows, mesh, axis)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        send_rows: Sequence[int],
        recv_rows: Sequence[int],
        mesh: Mesh,
        axis: str,
    ) -> Tensor:
        ctx.way = (send_rows, recv_rows, mesh, axis)
        y = x.new_empty((sum(recv_rows), *x.shape[1:]))
        exchange_rows(x.contiguous(), y, send_rows, recv_rows, mesh, axis, op="all_to_all").wait()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        send_rows, recv_rows, mesh, axis = ctx.way
        dy = grads[0].contiguous()
        dx = dy.new_empty((sum(send_rows), *dy.shape[1:]))
        op = "all_to_all backward"
        exchange_rows(dy, dx, recv_rows, send_rows, mesh, axis, op=op).wait()
        return dx, None, None, None, None
