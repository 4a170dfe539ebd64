"""What each rank does in the tests of the benchmarked operations; run by rank_server.py."""

from __future__ import annotations

from typing import Any

import torch

from gangline.comm import collectives, perf_ops
from gangline.comm.chain import chain_broadcast, chain_reduce
from gangline.comm.errors import CommError
from gangline.comm.handle import Handle
from gangline.comm.mesh import Mesh
from gangline.comm.perf_case import Case
from gangline.comm.perf_check import Values
from gangline.comm.perf_ops import can_reduce, start
from gangline.comm.perf_sizes import (
    OPERATIONS,
    REDUCE_OPS,
    REDUCING,
    ROOTED,
    TYPES,
    UNCHECKED_IN_PLACE,
    WORD_BYTES,
    counts_of,
)
from gangline.comm.perf_timing import Bench, Timing

IMPLEMENTATIONS = ("torch", "gangline")


def make_case(mesh: Mesh, operation: str, implementation: str, **more: Any) -> Case:
    type_name = more.get("type_name", "float")
    word = WORD_BYTES[type_name]
    return Case(
        operation=operation,
        implementation=implementation,  # type: ignore[arg-type]
        type_name=type_name,
        redop=more.get("redop", "sum"),
        root=more.get("root", 0),
        counts=counts_of(operation, more.get("num_bytes", 1 << 12) // word, word, mesh.world_size),
    )


def usable(mesh: Mesh) -> list[str]:
    n = mesh.world_size
    return [name for name in OPERATIONS if name != "hypercube" or not n & (n - 1)]


def run_everything(mesh: Mesh, num_bytes: int, unalign: int) -> dict[str, int]:
    """Run every operation of both implementations, with every root and both places."""
    num_wrong = {}
    bench = Bench(mesh, 4 * num_bytes, Timing(iters=3, unalign=unalign, checks=2))
    for operation in usable(mesh):
        roots = range(mesh.world_size) if operation in ROOTED else [0]
        for implementation in IMPLEMENTATIONS:
            for root in roots:
                case = make_case(mesh, operation, implementation, root=root, num_bytes=num_bytes)
                bench.warm_up(case, 1)
                for in_place in (False, True):
                    checked = not in_place or operation not in UNCHECKED_IN_PLACE
                    done = bench.measure(case, in_place=in_place, checked=checked)
                    assert done.time_s > 0
                    assert (done.num_wrong is None) == (not checked)
                    num_wrong[f"{operation} {implementation} {root} {in_place}"] = (
                        done.num_wrong or 0
                    )
    return num_wrong


def run_types(mesh: Mesh) -> dict[str, list[str]]:
    """Run every type and operator; return which ones each implementation can reduce."""
    can: dict[str, list[str]] = {}
    bench = Bench(mesh, 1 << 12, Timing(iters=1))
    for type_name in TYPES:
        case = make_case(mesh, "all_gather", "torch", type_name=type_name)
        assert bench.measure(case, in_place=False, checked=True).num_wrong == 0, type_name
    for implementation in IMPLEMENTATIONS:
        for operation in sorted(REDUCING):
            for type_name in TYPES:
                for redop in REDUCE_OPS:
                    if not can_reduce(operation, implementation, type_name, redop, mesh):  # type: ignore[arg-type]
                        continue
                    can.setdefault(f"{implementation} {operation}", []).append(
                        f"{type_name} {redop}"
                    )
                    case = make_case(
                        mesh, operation, implementation, type_name=type_name, redop=redop
                    )
                    for in_place in (False, True):
                        done = bench.measure(case, in_place=in_place, checked=True)
                        assert done.num_wrong == 0, (case, in_place)
    return can


def see_corruption(mesh: Mesh) -> int:
    """Change one element of each operation's result in turn; the check must see just that."""
    num_seen = 0
    bench = Bench(mesh, 1 << 13, Timing(iters=1))
    for operation in usable(mesh):
        for implementation in IMPLEMENTATIONS:
            for in_place in (False, True):
                if in_place and operation in UNCHECKED_IN_PLACE:
                    continue
                case = make_case(mesh, operation, implementation)
                values = Values(case, mesh)
                send, recv = bench.tensors(case, 0, in_place=in_place)
                values.fill(send, recv, repetition=7)
                start(case, send, recv, mesh).wait()
                assert values.num_wrong(recv, repetition=7, in_place=in_place) == 0
                if operation == "reduce" and mesh.rank != 0:
                    continue  # nothing is promised of the others' tensors
                for place in {0, recv.numel() // 2, recv.numel() - 1}:
                    right = recv[place].clone()
                    recv[place] = right + 1
                    wrong = values.num_wrong(recv, repetition=7, in_place=in_place)
                    assert wrong == 1, (case, in_place, place, wrong)
                    recv[place] = right
                    num_seen += 1
                # The result of another repetition is wrong nearly everywhere.
                stale = values.num_wrong(recv, repetition=8, in_place=in_place)
                has_data = operation != "gather" or mesh.rank == 0
                assert not has_data or stale > 0.9 * recv.numel(), (case, stale)
    return num_seen


def swap_blocks(mesh: Mesh) -> None:
    """Exchange two ranks' blocks of an all-gather: every element of both is wrong."""
    case = make_case(mesh, "all_gather", "torch")
    bench = Bench(mesh, 1 << 12, Timing())
    values = Values(case, mesh)
    send, recv = bench.tensors(case, 0, in_place=False)
    values.fill(send, recv, repetition=1)
    start(case, send, recv, mesh).wait()
    part = case.counts.parameter
    swapped = recv.clone()
    swapped[:part], swapped[part : 2 * part] = recv[part : 2 * part], recv[:part]
    wrong = values.num_wrong(swapped, repetition=1, in_place=False)
    assert wrong > 1.9 * part, wrong


def measure_with_a_liar(mesh: Mesh, liar: int) -> list[Any]:
    """Let one rank's results be wrong in three places; return what all ranks hear of it."""
    honest = perf_ops.start

    def lie(case: Case, send: torch.Tensor, recv: torch.Tensor, mesh: Mesh) -> Handle:
        handle = honest(case, send, recv, mesh)
        if mesh.rank == liar:
            handle.wait()
            recv[:3] += 1
        return handle

    perf_ops.start = lie
    try:
        case = make_case(mesh, "all_reduce", "torch")
        done = Bench(mesh, 1 << 12, Timing(iters=2)).measure(case, in_place=False, checked=True)
    finally:
        perf_ops.start = honest
    return [done.num_wrong, done.num_wrong_ranks]


def measure_ways(mesh: Mesh) -> dict[str, Any]:
    """Measure once with every way of waiting and averaging."""
    case = make_case(mesh, "all_reduce", "torch", num_bytes=1 << 16)
    found: dict[str, Any] = {}
    num_done = 0

    def count() -> None:
        nonlocal num_done
        num_done += 1

    for blocking in range(4):
        timing = Timing(iters=4, agg_iters=3, blocking=blocking, average=3, checks=0)
        bench = Bench(mesh, 1 << 16, timing, count)
        done = bench.measure(case, in_place=False, checked=True, each=True)
        found[f"blocking {blocking}"] = [done.time_s, done.iter_s, done.cpu_s]
        assert done.num_wrong is None
    for average in range(4):
        done = Bench(mesh, 1 << 16, Timing(iters=4, average=average)).measure(
            case, in_place=True, checked=True
        )
        found[f"average {average}"] = done.time_s
    found["num_done"] = num_done
    return found


def note_repetitions(mesh: Mesh) -> list[int]:
    """Return the number of each filling of the buffers, over two measurements."""
    noted = []
    fill = Values.fill

    def noting(self: Values, send: torch.Tensor, recv: torch.Tensor, *, repetition: int) -> None:
        noted.append(repetition)
        fill(self, send, recv, repetition=repetition)

    Values.fill = noting  # type: ignore[method-assign]
    try:
        bench = Bench(mesh, 1 << 12, Timing(iters=1, checks=3))
        for in_place in (False, True):
            bench.measure(make_case(mesh, "all_reduce", "torch"), in_place=in_place, checked=True)
    finally:
        Values.fill = fill  # type: ignore[method-assign]
    return noted


def keep_few_in_flight(mesh: Mesh) -> int:
    """Return the most operations that are under way at once under a small bound."""
    under_way = most = 0
    honest = perf_ops.start

    class Counted(Handle):
        def __init__(self, handle: Handle) -> None:
            self._handle = handle

        def wait(self, timeout_s: float | None = None) -> None:
            nonlocal under_way
            self._handle.wait(timeout_s)
            under_way -= 1

    def counting(case: Case, send: torch.Tensor, recv: torch.Tensor, mesh: Mesh) -> Handle:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        return Counted(honest(case, send, recv, mesh))

    perf_ops.start = counting
    try:
        case = make_case(mesh, "broadcast", "gangline", num_bytes=1 << 16)
        timing = Timing(iters=20, max_in_flight_bytes=4 << 16)
        Bench(mesh, 1 << 16, timing).measure(case, in_place=False, checked=True)
    finally:
        perf_ops.start = honest
    return most


def chain(mesh: Mesh, num_elements: int, dtype: str, op: str) -> None:
    """Compare broadcast and reduce along the chain with their formulas, from every root."""
    kind = getattr(torch, dtype)

    def values(rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rank)
        return torch.randint(1, 4, (num_elements,), generator=generator).to(kind)

    merge: Any = {
        "sum": torch.add, "prod": torch.mul, "max": torch.maximum, "min": torch.minimum,
    }[op]  # fmt: skip
    handles: list[tuple[int, torch.Tensor, Handle, str | None]] = []
    for root in range(mesh.world_size):
        sent = values(root) if mesh.rank == root else torch.zeros(num_elements, dtype=kind)
        out = torch.full((num_elements,), 99).to(kind)
        handles.append((root, sent, chain_broadcast(sent, mesh, "world", root=root), None))
        reduced = chain_reduce(values(mesh.rank), out, mesh, "world", root=root, op=op)  # type: ignore[arg-type]
        handles.append((root, out, reduced, op))
    for root, tensor, handle, reduction in handles:  # all under way at once, waited for in order
        handle.wait()
        if reduction is None:
            assert torch.equal(tensor, values(root))
        elif mesh.rank == root:
            wanted = values(0)
            for rank in range(1, mesh.world_size):
                wanted = merge(wanted, values(rank))
            assert torch.equal(tensor, wanted), (root, op)
        else:
            assert bool((tensor == 99).all()), "the others' tensors are not touched"
    assert mesh.traffic.take().num_bytes.total() <= 2 * mesh.world_size * sent.nbytes


def chain_with_a_dead_link(mesh: Mesh) -> str:
    """Lose the rank in the middle of the chain while the others wait."""
    if mesh.rank == 1:
        import os
        import signal

        collectives.barrier(mesh, "world")
        os.kill(os.getpid(), signal.SIGKILL)
    collectives.barrier(mesh, "world")
    try:
        for _ in range(100):
            chain_broadcast(torch.zeros(1 << 18), mesh, "world", root=0).wait()
            collectives.barrier(mesh, "world")
    except CommError as error:
        return type(error).__name__
    return "nothing happened"
