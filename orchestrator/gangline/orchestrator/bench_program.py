"""What a worker runs for `kind: bench`: the benchmark of collectives over the job's ranks.

A bench whose values are wrong, or whose bandwidth is below what was asked for, fails its job.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import time
from pathlib import Path
from typing import Any

from gangline.monitoring.comm_bench_config import CommBenchConfig
from gangline.orchestrator.bench_files import TableFile, json_path, table_path, write_documents
from gangline.orchestrator.train_program import StepLog
from gangline.orchestrator.worker import Assignment, Control

Json = dict[str, Any]


class BenchFailedError(RuntimeError):
    """Values were wrong, or the bandwidth was too low."""


@dataclasses.dataclass(frozen=True)
class BenchProgramSpec:
    """What a worker needs to know before it is told its rank."""

    config: CommBenchConfig
    run_dir: Path
    comm_timeout_s: float
    num_gpus: int


class BenchProgram:
    """Measure once per generation.

    torch is imported inside the methods: the controller imports this module too, and needs none.
    """

    def __init__(self, spec: BenchProgramSpec) -> None:
        self._spec = spec
        self._store: object = None  # kept, for it ends with its last reference

    def prepare(self) -> Json:
        """Nothing is shared between the ranks but their group."""
        return {}

    def warm(self, shared: Json) -> None:
        """Import torch; with NVIDIA's binaries, see that they are there."""
        config = self._spec.config
        if config.implementation == "nccl-tests":
            from gangline.monitoring.nccl_tests_run import find_binary

            for operation in config.operations:
                find_binary(operation, config.binaries, os.environ.get("PATH", os.defpath))
            return
        import torch

        import gangline.monitoring.comm_bench  # noqa: F401 - for what it imports

        torch.set_num_threads(1)

    def open_store(self, world_size: int, host: str) -> int:
        """Open what the group meets at; NVIDIA's binaries need none."""
        if self._spec.config.implementation == "nccl-tests":
            return 0
        from gangline.comm.mesh import open_store

        self._store, port = open_store(world_size, host=host)
        return port

    def run(self, assignment: Assignment, control: Control) -> Json:
        """Measure all operations, or until a stop.

        Raises: BenchFailedError on rank 0; CommError; UnsupportedError.
        """
        if self._spec.config.implementation == "nccl-tests":
            return self._run_binaries(assignment, control)
        return self._run_on_mesh(assignment, control)

    def _run_on_mesh(self, assignment: Assignment, control: Control) -> Json:
        from gangline.comm.abort import AbortSwitch
        from gangline.comm.mesh import Mesh
        from gangline.monitoring.comm_bench import Report, Surroundings, run_operation

        spec, config = self._spec, self._spec.config
        switch = AbortSwitch()  # made first, so that also the join can be aborted
        control.abort = switch.abort
        mesh = Mesh.join(
            rank=assignment.rank,
            world_size=assignment.world_size,
            store_host=assignment.master_host,
            store_port=assignment.master_port,
            generation=assignment.generation,
            device="cuda" if spec.num_gpus else "cpu",
            timeout_s=config.timeout_s or spec.comm_timeout_s,
            switch=switch,
        )
        is_first = assignment.rank == 0
        reports: list[Report] = []
        sink = BenchSink(spec.run_dir, assignment.generation, control) if is_first else None
        try:
            for operation in config.operations:
                if sink is not None:
                    sink.operation = operation
                report = run_operation(
                    operation,
                    config,
                    mesh,
                    sink=sink,
                    surroundings=Surroundings(
                        version=importlib.metadata.version("gangline"), environment=os.environ
                    ),
                    on_progress=functools.partial(_keep_alive, control),
                    should_stop=control.should_stop.is_set,
                )
                reports.append(report)
                if report.was_stopped:
                    break
        finally:
            mesh.leave()
            if sink is not None:
                sink.close()
                write_documents(json_path(spec.run_dir), [r.json for r in reports])
        if is_first:
            _raise_failed([r.sentence(config.min_busbw_gbs) for r in reports if not r.is_ok])
        return {"stopped": any(r.was_stopped for r in reports), "step": control.step}

    def _run_binaries(self, assignment: Assignment, control: Control) -> Json:
        """Run NVIDIA's binaries on this worker's own GPUs."""
        from gangline.monitoring.nccl_tests_run import run_binary

        spec, rank = self._spec, assignment.rank
        table = TableFile(table_path(spec.run_dir, rank))
        documents, failures = [], []

        def show(line: str) -> None:
            table.write(line)
            print(line, end="", flush=True)

        try:
            for operation in spec.config.operations:
                done = run_binary(
                    operation,
                    spec.config,
                    num_threads=1,
                    num_gpus=spec.num_gpus,
                    environment=os.environ,
                    on_line=show,
                    on_progress=functools.partial(_keep_alive, control),
                    should_stop=control.should_stop.is_set,
                )
                control.progress(control.step + 1)
                if done.document is not None:
                    documents.append(done.document)
                if control.should_stop.is_set():
                    break
                if done.exit_code != 0 or not done.report.is_ok:
                    failures.append(done.sentence())
        finally:
            table.close()
            write_documents(json_path(spec.run_dir, rank), documents)
        _raise_failed(failures)
        return {"stopped": control.should_stop.is_set(), "step": control.step}


class BenchSink:
    """Take rank 0's output: to the table's file, to the rank's log, and its figures to tracking."""

    def __init__(self, run_dir: Path, generation: int, control: Control) -> None:
        self._table = TableFile(table_path(run_dir))
        self._log = StepLog(run_dir, generation, 0)
        self._control = control
        self.operation = ""

    def text(self, text: str) -> None:
        """Take a piece of the table."""
        self._table.write(text)
        print(text, end="", flush=True)

    def result(self, result: Json) -> None:
        """Take a row."""
        self._control.progress(self._control.step + 1)
        values = bench_metrics(self.operation, result)
        fields = {"step": result["size"], "time": time.time(), "values": values}
        self._log.write("bench", fields)

    def close(self) -> None:
        """Close the files."""
        self._table.close()
        self._log.__exit__()


def bench_metrics(operation: str, result: Json) -> dict[str, float]:
    """Return the metrics of one row of nccl-tests' JSON; their step is the size in bytes."""
    values: dict[str, float] = {}
    for place in ("out_of_place", "in_place"):
        half = result.get(place) or {}
        found = {
            "algbw_gbs": half.get("alg_bw"),
            "busbw_gbs": half.get("bus_bw"),
            "num_wrong": half.get("nwrong"),
        }
        values |= {
            f"bench/{operation}/{place}/{name}": float(value)
            for name, value in found.items()
            if isinstance(value, (int, float))
        }
    return values


def _keep_alive(control: Control) -> None:
    """Tell that an operation is done: large sizes take longer than a hang is allowed to."""
    control.progress(control.step)


def _raise_failed(sentences: list[str]) -> None:
    if sentences:
        raise BenchFailedError(f"{'; '.join(sentences)}; see artifacts/bench.txt")
