"""The operations of nccl-tests as our own code has them (collectives.py, chain.py)."""

from torch import Tensor

from gangline.comm import collectives
from gangline.comm.chain import chain_broadcast, chain_reduce
from gangline.comm.handle import Handle, start
from gangline.comm.mesh import Mesh
from gangline.comm.perf_case import AXIS, Case, Run, copy, uneven_rows
from gangline.comm.perf_torch import hypercube, reduce, send_recv


def _all_reduce(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    copy(send, recv)
    return collectives.all_reduce(recv, mesh, AXIS, op=case.redop)  # type: ignore[arg-type]


def _all_gather(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    return collectives.all_gather_into(recv.view(mesh.world_size, -1), send, mesh, AXIS)


def _reduce_scatter(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    return collectives.reduce_scatter(send.view(mesh.world_size, -1), recv, mesh, AXIS)


def _all_to_all(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    rows = [1] * mesh.world_size
    send_NC, recv_NC = send.view(mesh.world_size, -1), recv.view(mesh.world_size, -1)
    return collectives.exchange_rows(send_NC, recv_NC, rows, rows, mesh, AXIS, op="alltoall")


def _all_to_all_uneven(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    send_rows, recv_rows = uneven_rows(case, mesh)
    return collectives.exchange_rows(send, recv, send_rows, recv_rows, mesh, AXIS, op="alltoallv")


def _broadcast(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    if mesh.rank == case.root:
        copy(send, recv)
    if mesh.device.type == "cuda":
        return collectives.broadcast(recv, mesh, AXIS, root=case.root)
    return chain_broadcast(recv, mesh, AXIS, root=case.root)


def _reduce(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    if mesh.device.type == "cuda":
        return reduce(case, send, recv, mesh)
    return chain_reduce(send, recv, mesh, AXIS, root=case.root, op=case.redop)  # type: ignore[arg-type]


def _gather(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    n, is_root = mesh.world_size, mesh.rank == case.root
    send_rows = [send.numel() if place == case.root else 0 for place in range(n)]
    recv_rows = [send.numel() if is_root else 0] * n
    target = recv if is_root else recv[:0]
    return collectives.exchange_rows(send, target, send_rows, recv_rows, mesh, AXIS, op="gather")


def _scatter(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    n, is_root = mesh.world_size, mesh.rank == case.root
    send_rows = [recv.numel() if is_root else 0] * n
    recv_rows = [recv.numel() if place == case.root else 0 for place in range(n)]
    source = send if is_root else send[:0]
    return collectives.exchange_rows(source, recv, send_rows, recv_rows, mesh, AXIS, op="scatter")


def _send_recv(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    if mesh.device.type == "cuda":
        return send_recv(case, send, recv, mesh)
    along = mesh.axes[AXIS]
    received = collectives.recv(recv, mesh, AXIS, source=(mesh.rank - 1) % along.size)
    sent = collectives.send(send, mesh, AXIS, to=(mesh.rank + 1) % along.size)

    def wait_for_both() -> None:
        received.wait()
        sent.wait()

    return start(case.operation, along, mesh, list, finish=wait_for_both)


OF_GANGLINE: dict[str, Run] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "alltoall": _all_to_all,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "gather": _gather,
    "scatter": _scatter,
    "sendrecv": _send_recv,
    "hypercube": hypercube,
    "alltoallv": _all_to_all_uneven,
}
