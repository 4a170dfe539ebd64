"""The operations of nccl-tests as plain torch.distributed has them.

torch.distributed reduces and broadcasts in place only: out of place, we copy first.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from gangline.comm.handle import Handle, start
from gangline.comm.mesh import Mesh
from gangline.comm.perf_case import AXIS, Case, Run, copy, uneven_rows

REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "avg": dist.ReduceOp.AVG,
}


def _run(case: Case, mesh: Mesh, call: Callable[[dist.ProcessGroup], dist.Work | None]) -> Handle:
    along = mesh.axes[AXIS]
    group = along.group
    assert group is not None, "one rank alone does not communicate"
    return start(case.operation, along, mesh, lambda: call(group))


def _all_reduce(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    copy(send, recv)
    op = REDUCE_OPS[case.redop]
    return _run(case, mesh, lambda group: dist.all_reduce(recv, op, group=group, async_op=True))


def _all_gather(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    return _run(
        case,
        mesh,
        lambda group: dist.all_gather_single(recv, send, group=group, async_op=True),
    )


def _reduce_scatter(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    op = REDUCE_OPS[case.redop]
    return _run(
        case,
        mesh,
        lambda group: dist.reduce_scatter_single(recv, send, op, group=group, async_op=True),
    )


def _all_to_all(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    return _run(
        case, mesh, lambda group: dist.all_to_all_single(recv, send, group=group, async_op=True)
    )


def _all_to_all_uneven(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    send_rows, recv_rows = uneven_rows(case, mesh)
    return _run(
        case,
        mesh,
        lambda group: dist.all_to_all_single(
            recv, send, recv_rows, send_rows, group=group, async_op=True
        ),
    )


def _broadcast(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    if mesh.rank == case.root:
        copy(send, recv)
    return _run(
        case,
        mesh,
        lambda group: dist.broadcast(recv, group=group, group_src=case.root, async_op=True),
    )


def reduce(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    copy(send, recv)
    op = REDUCE_OPS[case.redop]
    return _run(
        case,
        mesh,
        lambda group: dist.reduce(recv, op=op, group=group, group_dst=case.root, async_op=True),
    )


def _gather(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    rows = list(recv.chunk(mesh.world_size)) if mesh.rank == case.root else None
    return _run(
        case,
        mesh,
        lambda group: dist.gather(send, rows, group=group, group_dst=case.root, async_op=True),
    )


def _scatter(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    rows = list(send.chunk(mesh.world_size)) if mesh.rank == case.root else None
    return _run(
        case,
        mesh,
        lambda group: dist.scatter(recv, rows, group=group, group_src=case.root, async_op=True),
    )


def send_recv(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    """Send to the next rank and receive from the one before."""
    size = mesh.world_size
    return _swap(case, mesh, (send, (mesh.rank + 1) % size), (recv, (mesh.rank - 1) % size))


def hypercube(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    """Gather in log2 N exchanges with the rank whose number differs in one bit; N a power of two.

    Each exchange sends what the one before has brought, so they run inside `wait`.
    """
    along, rank = mesh.axes[AXIS], mesh.rank
    size = send.numel()

    def exchange() -> None:
        copy(send, recv[rank * size :][:size])
        for bit in range(along.size.bit_length() - 1):
            width = 1 << bit
            mine = rank // width * width
            theirs = mine ^ width
            outgoing = recv[mine * size :][: width * size], rank ^ width
            incoming = recv[theirs * size :][: width * size], rank ^ width
            _swap(case, mesh, outgoing, incoming).wait()

    return start(case.operation, along, mesh, list, finish=exchange)


def _swap(
    case: Case, mesh: Mesh, outgoing: tuple[Tensor, int], incoming: tuple[Tensor, int]
) -> Handle:
    """Send one tensor to a rank and receive one from a rank, as one: NCCL would else wait for ever.

    On NCCL a receive that is started alone blocks the send behind it, on all ranks at once.
    """
    group = mesh.axes[AXIS].group
    (sent, to), (received, source) = outgoing, incoming
    parts = [
        dist.P2POp(dist.irecv, received, group=group, group_peer=source),
        dist.P2POp(dist.isend, sent, group=group, group_peer=to),
    ]
    return start(case.operation, mesh.axes[AXIS], mesh, lambda: dist.batch_isend_irecv(parts))


OF_TORCH: dict[str, Run] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "alltoall": _all_to_all,
    "broadcast": _broadcast,
    "reduce": reduce,
    "gather": _gather,
    "scatter": _scatter,
    "sendrecv": send_recv,
    "hypercube": hypercube,
    "alltoallv": _all_to_all_uneven,
}
