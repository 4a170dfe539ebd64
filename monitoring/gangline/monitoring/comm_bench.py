"""Run nccl-tests' benchmark over torch.distributed on the ranks of a mesh.

Every rank calls `run_operation`; rank 0's `sink` gets the table as nccl-tests prints it, row by
row, and every rank gets the report. How it is measured is in comm/perf_timing.py, what the text
and the JSON look like in comm_bench_table.py and comm_bench_json.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from gangline.comm import collectives
from gangline.comm.mesh import Mesh
from gangline.comm.perf_case import AXIS, DTYPES, Case
from gangline.comm.perf_ops import can_reduce
from gangline.comm.perf_sizes import (
    REDUCE_OPS,
    REDUCING,
    ROOTED,
    UNCHECKED_IN_PLACE,
    WORD_BYTES,
    bandwidths_gbs,
    counts_of,
    redop_column,
)
from gangline.comm.perf_timing import Bench, Measured, Timing
from gangline.monitoring import comm_bench_json, comm_bench_table
from gangline.monitoring.comm_bench_config import ALL, ALL_ROOTS, CommBenchConfig
from gangline.monitoring.comm_bench_place import (
    devices_of,
    fit_to_memory,
    library,
    nccl_version,
)
from gangline.monitoring.comm_bench_table import Block, IterationStats

Json = dict[str, Any]


class UnsupportedError(ValueError):
    """What was asked for, the backend cannot do; says what it can."""


class Sink(Protocol):
    """Where rank 0's output goes, as it comes."""

    def text(self, text: str) -> None:
        """Take the next piece of the table."""

    def result(self, result: Json) -> None:
        """Take one row, as JSON has it."""


@dataclass(frozen=True)
class Report:
    """What one operation came to."""

    operation: str
    busbw_gbs: float
    num_failed: int
    is_fast_enough: bool
    was_stopped: bool
    json: Json

    @property
    def is_ok(self) -> bool:
        """Whether all values were right, and the bandwidth is what was wanted."""
        return self.num_failed == 0 and self.is_fast_enough

    def sentence(self, min_busbw_gbs: float | None) -> str:
        """Say in one line what is wrong, or what was measured."""
        found = f"{self.operation}: average bus bandwidth {self.busbw_gbs:g} GB/s"
        if self.num_failed:
            return f"{found}, wrong values in {self.num_failed} measurements"
        if not self.is_fast_enough and min_busbw_gbs is not None:
            wanted = f"{0.9 * min_busbw_gbs:g} (9/10 of bench.min_busbw_gbs)"
            return f"{found}, wanted at least {wanted}"
        return found


@dataclass(frozen=True)
class Surroundings:
    """What a report says of where it was made."""

    version: str  # Gangline's
    environment: Mapping[str, str]


def run_operation(
    operation: str,
    config: CommBenchConfig,
    mesh: Mesh,
    *,
    sink: Sink | None,
    surroundings: Surroundings,
    on_progress: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Measure one operation at all sizes, for all types, operators and roots asked for.

    `sink` is rank 0's, None elsewhere. `on_progress` is called after every single operation.
    `should_stop` on any rank ends the table after the row that is under way.

    Communicates: the operation, and a few numbers per row.
    Raises: UnsupportedError on every rank alike; CommError.
    """
    start_time = _now()
    fitted = fit_to_memory(config, mesh)
    devices = devices_of(mesh)
    out = sink or _Nowhere()
    version = nccl_version(mesh)
    out.text(
        comm_bench_table.header(
            fitted,
            operation,
            devices,
            runs_on=f"{library(config, mesh)} (Gangline {surroundings.version}, not NVIDIA's "
            "binary)",
            nccl_version=version,
            was_reduced=fitted.max_bytes < config.max_bytes,
        )
    )
    config = fitted
    table = _Table(operation, config, mesh, out, on_progress, should_stop)
    cases = table.cases()
    out.text(comm_bench_table.columns(config))
    was_stopped = table.run(cases)
    busbw_gbs = table.mean_busbw_gbs()
    out.text(
        comm_bench_table.footer(
            operation,
            num_failed=table.num_failed,
            busbw_gbs=busbw_gbs,
            min_busbw_gbs=config.min_busbw_gbs,
        )
    )
    return Report(
        operation=operation,
        busbw_gbs=busbw_gbs,
        num_failed=table.num_failed,
        is_fast_enough=comm_bench_table.is_fast_enough(busbw_gbs, config.min_busbw_gbs),
        was_stopped=was_stopped,
        json=comm_bench_json.document(
            start_time=start_time,
            end_time=_now(),
            args=[f"{operation}_perf", *config.flags()],
            environment=surroundings.environment,
            nccl_version=version,
            config=comm_bench_json.config_json(config, devices),
            results=table.results,
            num_failed=table.num_failed,
            busbw_gbs=busbw_gbs,
            min_busbw_gbs=config.min_busbw_gbs,
        ),
    )


@dataclass(frozen=True)
class _Kind:
    """One combination of type, operator and root."""

    type_name: str
    redop: str
    root: int


class _Table:
    """The rows of one operation."""

    def __init__(
        self,
        operation: str,
        config: CommBenchConfig,
        mesh: Mesh,
        sink: Sink,
        on_progress: Callable[[], None],
        should_stop: Callable[[], bool],
    ) -> None:
        assert config.implementation != "nccl-tests", "the binaries run themselves"
        self._implementation = config.implementation
        self._operation, self._config, self._mesh = operation, config, mesh
        self._sink, self._should_stop = sink, should_stop
        timing = Timing(
            iters=config.iters,
            agg_iters=config.agg_iters,
            average=config.average,
            blocking=config.blocking,
            checks=config.checks,
            unalign=config.unalign,
        )
        self._bench = Bench(mesh, config.max_bytes, timing, on_progress)
        self.num_failed = 0
        self.results: list[Json] = []
        self._busbws_gbs: list[float] = []

    def cases(self) -> list[_Kind]:
        """Return what to measure; say in a comment what is left out of `all`, and why.

        Raises: UnsupportedError when nothing is left, or what was named cannot be done.
        """
        config, operation, n = self._config, self._operation, self._mesh.world_size
        if operation == "hypercube" and n & (n - 1):
            self._sink.text(f"# nRanks {n} is not a power of 2, skipping\n")
            return []
        types = list(DTYPES) if config.datatype == ALL else [config.datatype]
        redops = [config.redop] if config.redop != ALL else list(REDUCE_OPS)
        if operation not in REDUCING:
            redops = redops[:1]
        roots = [-1]
        if operation in ROOTED:
            roots = list(range(n)) if config.root == ALL_ROOTS else [config.root]
        kinds: list[_Kind] = []
        left_out: dict[str, list[str]] = {}
        for type_name in types:
            for redop in redops:
                if operation not in REDUCING or can_reduce(
                    operation, self._implementation, type_name, redop, self._mesh
                ):
                    kinds += [_Kind(type_name, redop, root) for root in roots]
                else:
                    left_out.setdefault(type_name, []).append(redop)
        named = ", ".join(f"{name} ({' '.join(ops)})" for name, ops in left_out.items())
        if left_out and (not kinds or ALL not in (config.datatype, config.redop)):
            raise UnsupportedError(
                f"{operation} has no {named} with {library(config, self._mesh)}; choose another "
                "bench.datatype or bench.redop, or set bench.implementation to torch"
            )
        if left_out:
            self._sink.text(f"# not supported here, left out: {named}\n")
        return kinds

    def run(self, kinds: Sequence[_Kind]) -> bool:
        """Measure and print every row; return True when it was asked to stop before the last."""
        cycles = self._config.run_cycles
        for kind in kinds:
            self._warm_up(kind)
            cycle = 0
            while cycle < cycles or cycles == 0:
                cycle += 1
                for size in self._config.sizes():
                    if self._somebody_wants_to_stop():
                        return True
                    self._row(kind, size)
        return False

    def mean_busbw_gbs(self) -> float:
        """Return the mean over all halves of rows; not a number where there is none."""
        count = len(self._busbws_gbs)
        return sum(self._busbws_gbs) / count if count else math.nan

    def _case(self, kind: _Kind, size: int) -> Case:
        word = WORD_BYTES[kind.type_name]
        return Case(
            operation=self._operation,
            implementation=cast(Any, self._implementation),
            type_name=kind.type_name,
            redop=kind.redop,
            root=max(kind.root, 0),
            counts=counts_of(self._operation, size // word, word, self._mesh.world_size),
        )

    def _warm_up(self, kind: _Kind) -> None:
        size = self._config.min_bytes
        while size <= self._config.max_bytes:
            self._bench.warm_up(self._case(kind, size), self._config.warmup_iters)
            size *= 2

    def _row(self, kind: _Kind, size: int) -> None:
        case, config = self._case(kind, size), self._config
        word, counts = WORD_BYTES[kind.type_name], case.counts
        blocks, iter_s = [], []
        for in_place in (False, True):
            checked = not in_place or self._operation not in UNCHECKED_IN_PLACE
            measured = self._bench.measure(
                case, in_place=in_place, checked=checked, each=config.per_iter_timing
            )
            algbw, busbw = bandwidths_gbs(
                self._operation, counts, word, measured.time_s, self._mesh.world_size
            )
            self.num_failed += measured.num_wrong_ranks
            self._busbws_gbs.append(busbw)
            blocks.append(self._block(measured, algbw, busbw))
            iter_s.append(measured.iter_s)
        fields: Json = {
            "size_bytes": max(counts.send, counts.recv) * word,
            "count": counts.parameter,
            "type_name": kind.type_name,
            "redop": redop_column(self._operation, kind.redop),
            "root": kind.root,
            "blocks": blocks,
        }
        timestamp = _now() if config.report_timestamps else ""
        self._sink.text(comm_bench_table.row(**fields, timestamp=timestamp))
        result = comm_bench_json.result_json(**fields, iter_s=iter_s, config=config)
        self.results.append(result)
        self._sink.result(result)

    def _block(self, measured: Measured, algbw_gbs: float, busbw_gbs: float) -> Block:
        seconds = measured.cpu_s if self._config.report_cputime else measured.time_s
        stats = None
        if measured.iter_s:
            times = comm_bench_json.slowest(measured.iter_s)[self._config.per_iter_skip :]
            stats = iteration_stats(times)
        return Block(seconds * 1e6, algbw_gbs, busbw_gbs, measured.num_wrong, stats)

    def _somebody_wants_to_stop(self) -> bool:
        flag = torch.tensor([int(self._should_stop())])
        collectives.all_reduce(flag, self._mesh, AXIS, op="max").wait()
        return bool(flag.item())


def iteration_stats(seconds: Sequence[float]) -> IterationStats:
    """Return the spread of single iterations; percentiles by nearest rank, as nccl-tests."""
    times = sorted(second * 1e6 for second in seconds)
    n = len(times)
    mean = sum(times) / n
    variance = sum((value - mean) ** 2 for value in times) / n

    def percentile(percent: int) -> float:
        return times[min(n - 1, (n * percent + 99) // 100 - 1)]

    return IterationStats(
        min_us=times[0],
        max_us=times[-1],
        avg_us=mean,
        p50_us=times[n // 2],
        p95_us=percentile(95),
        p99_us=percentile(99),
        stdev_us=math.sqrt(variance),
    )


def _now() -> str:
    return time.strftime(comm_bench_table.TIMESTAMP_FORMAT)


class _Nowhere:
    """The sink of the other ranks."""

    def text(self, text: str) -> None:
        """Drop it."""

    def result(self, result: Json) -> None:
        """Drop it."""
