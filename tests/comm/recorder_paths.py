"""Each way by which a program can communicate, taken once on each rank; what is recorded of it."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from gangline.comm.events import Op
from gangline.comm.mesh import Mesh

sys.path.insert(0, str(Path(__file__).parent))  # ranks import this file by its path
from recorder_ranks import (  # type: ignore[import-not-found]
    Ranks,
    event_row,
    recorded,
    rings_of,
)

PATHS: dict[str, Callable[[Ranks], Any]] = {}


def path(call: Callable[[Ranks], Any]) -> Callable[[Ranks], Any]:
    PATHS[call.__name__] = call
    return call


@path
def all_reduce(r: Ranks) -> None:
    dist.all_reduce(r.x)
    assert r.x[0] == 3


@path
def all_reduce_async(r: Ranks) -> None:
    work = dist.all_reduce(r.x, async_op=True)
    assert work.get_future() is not None
    work.wait()
    assert r.x[0] == 3
    assert work.is_completed()


@path
def all_reduce_in_inference_mode(r: Ranks) -> None:
    with torch.inference_mode():
        dist.all_reduce(torch.ones(8, dtype=torch.int64))


@path
def all_reduce_sparse(r: Ranks) -> None:
    x = torch.eye(4).to_sparse()
    dist.all_reduce(x)
    assert x.to_dense()[0, 0] == 2


@path
def all_reduce_coalesced(r: Ranks) -> None:
    dist.all_reduce_coalesced([r.x, torch.ones(2)])


@path
def broadcast(r: Ranks) -> None:
    dist.broadcast(r.x, 1)
    assert r.x[0] == 2


@path
def reduce(r: Ranks) -> None:
    dist.reduce(r.x, 1)


@path
def all_gather(r: Ranks) -> None:
    dist.all_gather([torch.empty(8) for _ in range(r.world_size)], r.x)


@path
def all_gather_into_tensor(r: Ranks) -> None:
    dist.all_gather_into_tensor(r.wide, r.x)
    assert r.wide[-1] == 2


@path
def all_gather_coalesced(r: Ranks) -> None:
    dist.all_gather_coalesced([[torch.empty(8)] for _ in range(r.world_size)], [r.x])


@path
def reduce_scatter(r: Ranks) -> None:
    dist.reduce_scatter(r.x, [torch.ones(8) for _ in range(r.world_size)])
    assert r.x[0] == 2


@path
def reduce_scatter_tensor(r: Ranks) -> None:
    dist.reduce_scatter_tensor(r.x, r.wide)
    assert r.x[0] == 2


@path
def reduce_scatter_tensor_async(r: Ranks) -> None:
    work = dist.reduce_scatter_tensor(r.x, r.wide, async_op=True)
    work.wait()
    assert r.x[0] == 2


@path
def all_to_all_single(r: Ranks) -> None:
    dist.all_to_all_single(torch.empty(8 * r.world_size), r.wide)


@path
def all_to_all(r: Ranks) -> None:
    pieces = [torch.ones(8) for _ in range(r.world_size)]
    dist.all_to_all([torch.empty(8) for _ in range(r.world_size)], pieces)


@path
def gather(r: Ranks) -> None:
    dist.gather(r.x, [torch.empty(8) for _ in range(r.world_size)] if r.rank == 1 else None, 1)


@path
def scatter(r: Ranks) -> None:
    dist.scatter(r.x, [torch.ones(8) for _ in range(r.world_size)] if r.rank == 1 else None, 1)


@path
def barrier(r: Ranks) -> None:
    dist.barrier()


@path
def monitored_barrier(r: Ranks) -> None:
    dist.monitored_barrier()


@path
def send_and_recv(r: Ranks) -> None:
    if r.rank == 0:
        dist.send(r.x, 1)
    else:
        dist.recv(r.x, 0)
        assert r.x[0] == 1


@path
def recv_any_source(r: Ranks) -> None:
    if r.rank == 0:
        dist.send(r.x, 1)
    else:
        assert dist.recv(r.x) == 0


@path
def isend_and_irecv(r: Ranks) -> None:
    works = [dist.isend(r.x, r.other), dist.irecv(torch.empty(8), r.other)]
    for work in works:
        assert work is not None
        work.wait()


@path
def batch_isend_irecv(r: Ranks) -> None:
    batch = [
        dist.P2POp(dist.isend, r.x, r.other),
        dist.P2POp(dist.irecv, torch.empty(8), r.other),
    ]
    for work in dist.batch_isend_irecv(batch):
        work.wait()


@path
def all_gather_object(r: Ranks) -> None:
    got: list[Any] = [None] * r.world_size
    dist.all_gather_object(got, {"rank": r.rank})
    assert got[1] == {"rank": 1}


@path
def broadcast_object_list(r: Ranks) -> None:
    got = [r.rank]
    dist.broadcast_object_list(got, 1)
    assert got == [1]


@path
def gather_object(r: Ranks) -> None:
    dist.gather_object(r.rank, [None] * r.world_size if r.rank == 1 else None, 1)


@path
def scatter_object_list(r: Ranks) -> None:
    got: list[Any] = [None]
    dist.scatter_object_list(got, [10, 11] if r.rank == 0 else [None, None], 0)
    assert got == [10 + r.rank]


@path
def send_object_list(r: Ranks) -> None:
    got = [r.rank]
    dist.send_object_list(got, 1) if r.rank == 0 else dist.recv_object_list(got, 0)
    assert got == [0]


@path
def functional_all_reduce(r: Ranks) -> None:
    assert funcol.all_reduce(r.x, "sum", r.group).sum().item() == 24


@path
def functional_all_gather(r: Ranks) -> None:
    funcol.all_gather_tensor(r.x, 0, r.group).sum().item()


@path
def functional_reduce_scatter(r: Ranks) -> None:
    funcol.reduce_scatter_tensor(r.wide, "sum", 0, r.group).sum().item()


@path
def functional_all_to_all(r: Ranks) -> None:
    funcol.all_to_all_single(r.wide, None, None, r.group).sum().item()


@path
def functional_all_gather_coalesced(r: Ranks) -> None:
    for got in funcol.all_gather_into_tensor_coalesced([r.x, torch.ones(2)], r.group):
        got.sum().item()


@path
def functional_reduce_scatter_coalesced(r: Ranks) -> None:
    tensors = [r.wide, torch.ones(2)]
    for got in funcol.reduce_scatter_tensor_coalesced(tensors, "sum", [0, 0], r.group):
        got.sum().item()


@path
def differentiable_all_reduce(r: Ranks) -> None:
    import torch.distributed.nn.functional as dist_nn

    x = torch.ones(8, requires_grad=True)
    dist_nn.all_reduce(x).sum().backward()
    assert x.grad is not None


@path
def new_group(r: Ranks) -> None:
    group = dist.new_group([0, 1], group_desc="of two")
    dist.all_reduce(r.x, group=group)
    assert dist.get_backend(group) == "gloo"


@path
def new_group_of_others(r: Ranks) -> None:
    group = dist.new_group([1])
    if r.rank == 1:
        dist.all_reduce(r.x, group=group)


@path
def split_group(r: Ranks) -> Any:
    # Not of the default group: torch 2.13 crashes there when it is not the process's first.
    group = dist.new_group([0, 1]).split_group([0, 1], group_name="split", group_desc="split")
    group.allreduce([r.x]).wait()
    assert r.x[0] == 3
    return group  # nobody else knows of it


@path
def device_mesh(r: Ranks) -> None:
    mesh = init_device_mesh("cpu", (1, r.world_size), mesh_dim_names=("pp", "tp"))
    dist.all_reduce(r.x, group=mesh.get_group("tp"))


@path
def dtensor(r: Ranks) -> None:
    mesh = init_device_mesh("cpu", (r.world_size,))
    distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]).full_tensor()


@path
def dtensor_partial(r: Ranks) -> None:
    mesh = init_device_mesh("cpu", (r.world_size,))
    got = DTensor.from_local(r.x, mesh, [Partial()]).redistribute(mesh, [Replicate()])
    assert got.to_local()[0] == 3


@path
def ddp(r: Ranks) -> None:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    model(torch.ones(4, 64)).sum().backward()


@path
def fsdp2(r: Ranks) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    fully_shard(model, mesh=init_device_mesh("cpu", (r.world_size,)))
    model(torch.ones(4, 64)).sum().backward()


@path
def zero_redundancy_optimizer(r: Ranks) -> None:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()


@path
def ddp_with_a_hook_of_its_own(r: Ranks) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    model.register_comm_hook(None, fp16_compress_hook)
    model(torch.ones(4, 64)).sum().backward()


def run_paths(mesh: Mesh, folder: str, port: int, is_fallback: bool) -> dict[str, Any]:
    """Take every path once; return what this rank's rings got of it, and its error if any."""
    taken: dict[str, Any] = {}
    warnings.simplefilter("ignore")
    with recorded(mesh, folder, port, is_fallback=is_fallback) as ranks:
        for name, call in PATHS.items():
            before = {ring.path: ring.last_enqueued for ring in rings_of(folder, mesh.rank)}
            torch.manual_seed(0)
            error, kept = "", None
            try:
                kept = call(Ranks(ranks.rank, ranks.world_size))
            except Exception as problem:  # noqa: BLE001 - it is the test's to judge
                error = f"{type(problem).__name__}: {problem}"
            dist.barrier()  # with it the fallback sees the end of what C++ code has waited for
            events = [
                event
                for ring in rings_of(folder, mesh.rank)
                for event in ring.comm_events(since=before.get(ring.path, 0))
            ]
            *events, barrier = sorted(events, key=lambda event: event.enqueue_ns)
            assert barrier.op == Op.BARRIER
            taken[name] = {"error": error, "events": [event_row(event) for event in events]}
            del kept
    return taken
