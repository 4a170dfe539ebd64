"""The operations of nccl-tests over torch.distributed, on any backend.

Two implementations: `torch` calls torch.distributed as anybody would; `gangline` calls what our
own code calls (collectives.py, chain.py), which on gloo sends point-to-point messages where gloo's
own algorithm cannot fill a link.

What is only moved is moved as bytes, so every type can be; which types a backend reduces is
found out by `can_reduce`. The unsigned 32- and 64-bit types have the sums and products of the
signed ones, bit for bit, and no others.

Read next: perf_case, perf_torch and perf_own (the operations themselves), perf_sizes (how much),
perf_check (which values), perf_timing (how long).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from gangline.comm import collectives
from gangline.comm.chain import MERGE
from gangline.comm.handle import Handle
from gangline.comm.handle import start as start_call
from gangline.comm.mesh import Mesh
from gangline.comm.perf_case import AXIS, DTYPES, Case, Implementation, copy
from gangline.comm.perf_own import OF_GANGLINE
from gangline.comm.perf_sizes import REDUCING
from gangline.comm.perf_torch import OF_TORCH, REDUCE_OPS

_OPS_OF_UNSIGNED = ("sum", "prod")
# What our own functions take; a sum is all that training needs of a reduce-scatter.
_OPS_OF_GANGLINE = {
    "all_reduce": ("sum", "max", "min"),
    "reduce_scatter": ("sum",),
    "reduce": ("sum", "prod", "max", "min"),
}
# What torch and its backends raise for a type or an operation that they do not have.
_REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)


def start(case: Case, send: Tensor, recv: Tensor, mesh: Mesh) -> Handle:
    """Start the operation once.

    Shapes: send [counts.send], recv [counts.recv], both of `case.dtype` and contiguous. In place,
    `send` lies in `recv` or `recv` in `send`.
    Raises: CommError.
    """
    along = mesh.axes[AXIS]
    if not send.numel() and not recv.numel():
        return start_call(case.operation, along, mesh, list)
    if along.group is None:
        return start_call(case.operation, along, mesh, list, finish=lambda: copy(send, recv))
    if case.operation not in REDUCING:
        # As bytes, whatever the type: nothing is computed.
        send, recv = send.view(torch.uint8), recv.view(torch.uint8)
    run = OF_GANGLINE if case.implementation == "gangline" else OF_TORCH
    return run[case.operation](case, send, recv, mesh)


def can_reduce(
    operation: str, implementation: Implementation, type_name: str, redop: str, mesh: Mesh
) -> bool:
    """Find out whether every rank can run a reduction with this type and operator.

    Communicates: a reduction of one element per rank, where it is known to work so far, and a vote.
    """
    along = mesh.axes[AXIS]
    works = type_name not in ("uint32", "uint64") or redop in _OPS_OF_UNSIGNED
    if implementation == "gangline":
        works = works and redop in _OPS_OF_GANGLINE[operation]
    if along.group is None or not works:
        return works
    small = torch.zeros(along.size, dtype=DTYPES[type_name], device=mesh.device)
    try:
        if implementation == "gangline" and operation != "all_reduce":
            MERGE[redop](small, small)  # they merge on this rank, with torch's own kernels
        elif operation == "all_reduce":
            dist.all_reduce(small, REDUCE_OPS[redop], group=along.group)
        elif operation == "reduce":
            dist.reduce(small, op=REDUCE_OPS[redop], group=along.group, group_dst=0)
        else:
            dist.reduce_scatter_single(small[:1].clone(), small, REDUCE_OPS[redop], along.group)
    except _REFUSALS:
        works = False
    votes = torch.tensor([int(works)])
    collectives.all_reduce(votes, mesh, AXIS, op="min").wait()
    return bool(votes.item())
