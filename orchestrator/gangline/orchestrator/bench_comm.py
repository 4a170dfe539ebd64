"""Run the benchmark of collectives for `gangline bench comm`.

    run_here       ranks are processes on this machine, which meet on 127.0.0.1
    run_binaries   NVIDIA's nccl-tests, on this machine's GPUs
    run_on_ray     a `kind: bench` job on a Ray cluster, its workers spread over the nodes

All give the tables to `show` as they come, and return the same outcome.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gangline.monitoring.comm_bench_config import CommBenchConfig
from gangline.orchestrator import api
from gangline.orchestrator.bench_comm_rank import outcome_of
from gangline.orchestrator.bench_files import json_path, read_documents, table_path
from gangline.orchestrator.commands_bench_flags import in_flags
from gangline.orchestrator.errors import GanglineError, UsageError

Json = dict[str, Any]
Show = Callable[[str], None]
Device = Literal["cpu", "cuda"]

_LOOK_EVERY_S = 0.2
_DEFAULT_TIMEOUT_S = 60.0
# After the first rank has failed: how long to listen for the others, so that the cause is told.
_SETTLE_S = 3.0
_NUM_LAST_BYTES = 4096


@dataclass
class Outcome:
    """What a bench came to: nccl-tests' JSON per operation, and a sentence per failed check."""

    documents: list[Json] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run_here(config: CommBenchConfig, *, num_ranks: int, device: Device, show: Show) -> Outcome:
    """Measure between processes of this machine.

    Raises: UsageError for what the backend cannot do; GanglineError when a rank is lost.
    """
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="gangline-bench-")))
        ranks: list[subprocess.Popen[bytes]] = []
        cleanup.callback(_end, ranks)
        ranks.extend(
            _start_rank(folder, config, rank, num_ranks, device) for rank in range(num_ranks)
        )
        _show_until_end(ranks, folder, show)
        outcomes = [outcome_of(folder, rank) for rank in range(num_ranks)]
        _raise_if_lost(outcomes, ranks, folder)
    first = outcomes[0]
    assert first is not None, "a rank without an outcome is lost"
    return Outcome(documents=first["documents"], failures=first["failures"])


def _start_rank(
    folder: Path, config: CommBenchConfig, rank: int, num_ranks: int, device: Device
) -> subprocess.Popen[bytes]:
    order = {
        "parent": os.getpid(),
        "folder": str(folder),
        "rank": rank,
        "world_size": num_ranks,
        "device": device,
        "timeout_s": config.timeout_s or _DEFAULT_TIMEOUT_S,
        "config": config.model_dump(mode="json"),
    }
    with open(folder / f"rank-{rank}.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gangline.orchestrator.bench_comm_rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if rank == 0 else log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to act on
            # Ranks on one machine meet on its loopback, whatever its name resolves to.
            env={"GLOO_SOCKET_IFNAME": "lo", **os.environ},
        )
    assert process.stdin is not None, "made with a pipe"
    process.stdin.write(json.dumps(order).encode())
    process.stdin.close()
    return process


def _show_until_end(ranks: list[subprocess.Popen[bytes]], folder: Path, show: Show) -> None:
    """Hand on what rank 0 prints until all ranks have ended, or one is lost."""
    output = ranks[0].stdout
    assert output is not None, "made with a pipe"
    failed_s: float | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if selector.get_map() and selector.select(_LOOK_EVERY_S):
                text = os.read(output.fileno(), 1 << 16)
                if text:
                    show(text.decode())
                    continue
                selector.unregister(output)
            elif not selector.get_map():
                time.sleep(_LOOK_EVERY_S / 4)
            if all(process.poll() is not None for process in ranks):
                return
            if failed_s is None and _is_any_lost(ranks, folder):
                failed_s = time.monotonic()
            if failed_s is not None and time.monotonic() - failed_s > _SETTLE_S:
                return


def _is_any_lost(ranks: list[subprocess.Popen[bytes]], folder: Path) -> bool:
    return any(
        process.poll() is not None and "documents" not in (outcome_of(folder, rank) or {})
        for rank, process in enumerate(ranks)
    )


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _raise_if_lost(
    outcomes: list[Json | None], ranks: list[subprocess.Popen[bytes]], folder: Path
) -> None:
    """Raise the error of the rank that failed first: one that lost only its peer is no cause."""
    for rank, outcome in enumerate(outcomes):
        if outcome is None and ranks[rank].poll() is not None:
            code = ranks[rank].returncode
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            )
            raise GanglineError(f"rank {rank} {how}: {_last_line(folder / f'rank-{rank}.log')}")
    for outcome in outcomes:
        if outcome is not None and "unsupported" in outcome:
            raise UsageError(in_flags(outcome["unsupported"]))
    lost = [outcome for outcome in outcomes if outcome is not None and "lost" in outcome]
    if lost:
        raise GanglineError(min(lost, key=lambda outcome: float(outcome["at"]))["lost"])
    if None in outcomes:
        raise GanglineError(f"rank {outcomes.index(None)} does not answer; raise --timeout")


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _NUM_LAST_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def run_binaries(
    config: CommBenchConfig, *, num_threads: int, num_gpus: int, show: Show
) -> Outcome:
    """Measure with NVIDIA's binaries on this machine.

    Raises: GanglineError when a binary is missing or failed without a report.
    """
    from gangline.monitoring.nccl_tests_run import NcclTestsError, run_binary

    outcome = Outcome()
    for operation in config.operations:
        try:
            done = run_binary(
                operation,
                config,
                num_threads=num_threads,
                num_gpus=num_gpus,
                environment=os.environ,
                on_line=show,
            )
        except NcclTestsError as error:
            raise GanglineError(in_flags(str(error))) from error
        if done.document is not None:
            outcome.documents.append(done.document)
        if done.exit_code != 0 or not done.report.is_ok:
            outcome.failures.append(done.sentence())
    return outcome


def run_on_ray(
    config: CommBenchConfig,
    *,
    num_ranks: int,
    device: Device,
    num_gpus: int,
    address: str,
    runs: Path | None,
    show: Show,
    note: Callable[[str], None],
) -> Outcome:
    """Measure between workers of a Ray cluster, each on a node of its own as far as there are.

    The run folder is made in `runs`, which every node must see.

    Raises: what `api.run` does; GanglineError with the job's reason when it failed.
    """
    gpus = num_gpus if config.implementation == "nccl-tests" else int(device == "cuda")
    job = {
        "kind": "bench",
        "name": "bench-comm",
        "workers": {"count": num_ranks, "gpus": gpus, "place": "spread"},
        "bench": config.model_dump(mode="json"),
        "tracking": {"enabled": False},
    }
    tail: _Tail | None = None

    def start(info: api.JobInfo) -> None:
        nonlocal tail
        tail = _Tail(table_path(Path(info.run_dir)), show)
        note(f"{info.run_id} writes to {info.run_dir}")

    with tempfile.TemporaryDirectory(prefix="gangline-bench-") as scratch:
        file = Path(scratch) / "bench-comm.yaml"
        file.write_text(json.dumps(job), encoding="utf-8")  # JSON is YAML
        watcher = api.Watcher(
            on_start=start, on_record=lambda record: tail.read() if tail else None, on_note=note
        )
        info = api.run(file, address=address, runs=runs, watcher=watcher)
    if tail is not None:
        tail.read()
    documents = read_documents(json_path(Path(info.run_dir)))
    if info.state == "SUCCEEDED":
        return Outcome(documents=documents)
    if documents and "BenchFailedError" in info.reason:
        failure = info.reason.partition("BenchFailedError: ")[2].partition("; see artifacts")[0]
        return Outcome(documents=documents, failures=[failure])
    raise GanglineError(f"{info.run_id} {info.state}: {info.reason}")


class _Tail:
    """Show what is added to a file."""

    def __init__(self, path: Path, show: Show) -> None:
        self._path, self._show = path, show
        self._offset = 0

    def read(self) -> None:
        """Show what is new."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        if whole:
            self._show(whole.decode())
