"""Time an operation as nccl-tests does, and check what comes out of it.

One un-timed operation and a barrier; then all operations are started, and only then awaited, so
that they queue up as in training; the time of one is that of all over their number, merged over
the ranks as `average` says. Then the check, on fresh values.

What differs: at most `max_in_flight_bytes` are under way at once, because gloo and our exchanges
hold buffers of their own for each; beyond that the oldest is awaited first, which leaves the
queue full. On a CPU the time of a single iteration is from the end of the one before to its own.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.comm import collectives, perf_ops
from gangline.comm.handle import Handle
from gangline.comm.mesh import Mesh
from gangline.comm.perf_case import AXIS, Case
from gangline.comm.perf_check import Values

# How the ranks' times become one: rank 0's, their mean, the least, the greatest.
RANK_0, MEAN, LEAST, GREATEST = range(4)
# When a rank waits: at the end; after each with a barrier; after each; after each iteration with a
# barrier that is not timed.
QUEUED, EACH_WITH_BARRIER, EACH, ITERATION_WITH_BARRIER = range(4)

_FIRST_REPETITION = 99


@dataclass(frozen=True)
class Timing:
    """How a measurement is made; the fields are nccl-tests' -n -m -a -z -c -u."""

    iters: int = 20
    agg_iters: int = 1
    average: int = MEAN
    blocking: int = QUEUED
    checks: int = 1
    unalign: int = 0
    max_in_flight_bytes: int = 1 << 30


@dataclass(frozen=True)
class Measured:
    """What came of one measurement; but for `cpu_s` the same on every rank.

    `cpu_s` is the time to start an operation without waiting for it, on this rank. `num_wrong`
    counts elements over all ranks, None where nothing was checked; `num_wrong_ranks` the ranks that
    have any. `iter_s[rank][i]` is the time of iteration i, empty where it was not asked for.
    """

    time_s: float
    cpu_s: float
    num_wrong: int | None
    num_wrong_ranks: int
    iter_s: list[list[float]]


class Bench:
    """Hold the buffers of one operation up to a size, and measure cases in them.

    `on_progress` is called after every operation that is done, also in the warm-up.
    """

    def __init__(
        self,
        mesh: Mesh,
        max_bytes: int,
        timing: Timing,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._mesh, self._timing, self._on_progress = mesh, timing, on_progress
        self._max_bytes = max_bytes
        padded = max_bytes + 8 * timing.unalign  # enough for the widest type
        self._send = torch.zeros(padded, dtype=torch.uint8, device=mesh.device)
        self._recv = torch.zeros(padded, dtype=torch.uint8, device=mesh.device)
        self._repetition = 0

    def warm_up(self, case: Case, num_iters: int) -> None:
        """Run the operation out of place, untimed."""
        self._finish(deque(self._start(case, i, in_place=False) for i in range(num_iters)))

    def measure(self, case: Case, *, in_place: bool, checked: bool, each: bool = False) -> Measured:
        """Measure one case, and check it `timing.checks` times if it is to be checked.

        With `each` also the time of every iteration.

        Communicates: the operation, barriers, and three numbers.
        Raises: CommError.
        """
        timing = self._timing
        if timing.checks:
            send, recv = self.tensors(case, 0, in_place=in_place)
            Values(case, self._mesh).fill(send, recv, repetition=_FIRST_REPETITION)
        self._finish(deque([self._start(case, 0, in_place=in_place)]))
        self._synchronize()
        self._barrier()
        total_s, cpu_s, iter_s = self._run(case, in_place)
        num_ops = timing.iters * timing.agg_iters
        time_s = self._merge(total_s / num_ops)
        self._barrier()
        is_checked = checked and timing.checks > 0
        num_wrong, num_wrong_ranks = self._check(case, in_place) if is_checked else (None, 0)
        rows = self._gather(iter_s) if each else []
        return Measured(time_s, cpu_s / num_ops, num_wrong, num_wrong_ranks, rows)

    def tensors(self, case: Case, iteration: int, *, in_place: bool) -> tuple[Tensor, Tensor]:
        """Return what an iteration sends and receives: another place for each, as far as fits."""
        word, counts, rank = case.dtype.itemsize, case.counts, self._mesh.rank
        size = max(counts.send, counts.recv)
        num_places = self._max_bytes // (size * word) if size else 1
        shift = size * (iteration % max(num_places, 1)) + self._timing.unalign
        recv = self._view(self._recv, case)[shift:]
        if not in_place:
            send = self._view(self._send, case)[shift:]
            return send[: counts.send], recv[: counts.recv]
        send = recv[counts.send_offset * rank :][: counts.send]
        return send, recv[counts.recv_offset * rank :][: counts.recv]

    def _view(self, buffer: Tensor, case: Case) -> Tensor:
        word = case.dtype.itemsize
        return buffer[: buffer.numel() // word * word].view(case.dtype)

    def _run(self, case: Case, in_place: bool) -> tuple[float, float, list[float]]:
        """Run all iterations; return their time, that to start them, and the time of each."""
        blocking = self._timing.blocking
        marks = _Marks(self._mesh.device)
        begin_s = time.perf_counter()
        if blocking == QUEUED:
            under_way: deque[Handle] = deque()
            for iteration in self._iterations():
                while len(under_way) >= self._max_in_flight(case):
                    self._wait_for(under_way.popleft(), marks)
                under_way.append(self._start(case, iteration, in_place=in_place))
            cpu_s = time.perf_counter() - begin_s
            while under_way:
                self._wait_for(under_way.popleft(), marks)
            self._synchronize()
            total_s = time.perf_counter() - begin_s
        else:
            total_s = cpu_s = self._run_blocking(case, in_place, marks)
        return total_s, cpu_s, marks.seconds(self._timing.agg_iters)

    def _run_blocking(self, case: Case, in_place: bool, marks: "_Marks") -> float:
        blocking, per_iteration = self._timing.blocking, self._timing.agg_iters
        begin_s, excluded_s = time.perf_counter(), 0.0
        under_way: deque[Handle] = deque()
        for number, iteration in enumerate(self._iterations(), start=1):
            under_way.append(self._start(case, iteration, in_place=in_place))
            if blocking == ITERATION_WITH_BARRIER and number % per_iteration:
                continue
            while under_way:
                self._wait_for(under_way.popleft(), marks)
            self._synchronize()
            if blocking == EACH:
                continue
            barrier_s = time.perf_counter()
            self._barrier()
            if blocking == ITERATION_WITH_BARRIER:
                excluded_s += time.perf_counter() - barrier_s
                marks.leave_out()
        return time.perf_counter() - begin_s - excluded_s

    def _iterations(self) -> Iterator[int]:
        return iter(range(self._timing.iters * self._timing.agg_iters))

    def _max_in_flight(self, case: Case) -> int:
        size = max(case.counts.send, case.counts.recv) * case.dtype.itemsize
        return max(2, self._timing.max_in_flight_bytes // max(size, 1))

    def _start(self, case: Case, iteration: int, *, in_place: bool) -> Handle:
        return perf_ops.start(case, *self.tensors(case, iteration, in_place=in_place), self._mesh)

    def _wait_for(self, handle: Handle, marks: "_Marks") -> None:
        handle.wait()
        marks.add()
        self._on_progress()

    def _finish(self, handles: deque[Handle]) -> None:
        for handle in handles:
            handle.wait()
            self._on_progress()

    def _check(self, case: Case, in_place: bool) -> tuple[int, int]:
        """Run the operation on fresh values until some are wrong.

        Returns: the number of wrong elements over all ranks, and of ranks that have any.
        """
        values = Values(case, self._mesh)
        for _ in range(self._timing.checks):
            self._repetition += 1
            send, recv = self.tensors(case, 0, in_place=in_place)
            values.fill(send, recv, repetition=self._repetition)
            self._synchronize()
            self._finish(deque([perf_ops.start(case, send, recv, self._mesh)]))
            self._synchronize()
            wrong = values.num_wrong(recv, repetition=self._repetition, in_place=in_place)
            totals = torch.tensor([wrong, int(wrong > 0)])
            collectives.all_reduce(totals, self._mesh, AXIS).wait()
            num_wrong, num_wrong_ranks = totals.tolist()
            if num_wrong:
                return num_wrong, num_wrong_ranks
        return 0, 0

    def _merge(self, seconds: float) -> float:
        """Return the ranks' times as one, as `average` says."""
        average = self._timing.average
        mine = torch.tensor([seconds], dtype=torch.float64)
        if average == RANK_0:
            collectives.broadcast(mine, self._mesh, AXIS, root=0).wait()
        else:
            op = {MEAN: "sum", LEAST: "min", GREATEST: "max"}[average]
            collectives.all_reduce(mine, self._mesh, AXIS, op=op).wait()  # type: ignore[arg-type]
        return mine.item() / (self._mesh.world_size if average == MEAN else 1)

    def _gather(self, seconds: list[float]) -> list[list[float]]:
        mine = torch.tensor(seconds, dtype=torch.float64)
        return [row.tolist() for row in collectives.all_gather(mine, self._mesh, AXIS)]

    def _barrier(self) -> None:
        collectives.barrier(self._mesh, AXIS)

    def _synchronize(self) -> None:
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)


class _Marks:
    """The instants at which operations were done: by the clock, on CUDA by events."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[object] = []
        self._left_out_s: dict[int, float] = {}
        self.add()

    def add(self) -> None:
        """Note that one more operation is done."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def leave_out(self) -> None:
        """Note that what happened since the last operation was done is not the next one's."""
        last = self._marks[-1]
        if isinstance(last, float):
            self._left_out_s[len(self._marks) - 1] = time.perf_counter() - last

    def seconds(self, num_per_iteration: int) -> list[float]:
        """Return the time of each iteration over its number of operations."""
        each = []
        for index, (before, after) in enumerate(zip(self._marks, self._marks[1:], strict=False)):
            if isinstance(before, float) and isinstance(after, float):
                each.append(after - before - self._left_out_s.get(index, 0.0))
            else:
                each.append(before.elapsed_time(after) / 1e3)  # type: ignore[attr-defined]
        k = num_per_iteration
        return [sum(each[i : i + k]) / k for i in range(0, len(each), k)]
