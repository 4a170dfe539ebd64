"""nccl-tests' flags as options of `gangline bench comm`: their names, defaults and meaning."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Group, Parameter

from gangline.orchestrator.errors import GanglineError, UsageError

if TYPE_CHECKING:
    from gangline.monitoring.comm_bench_config import CommBenchConfig

_FLAGS = Group("nccl-tests' flags", sort_key=10)
# A table of their own kind: one needs a power of two, the other is uneven.
_NOT_OF_ALL = ("hypercube", "alltoallv")
_MIN_BANDWIDTH_VARIABLE = "NCCL_TESTS_MIN_BW"


def _flag(short: str, long: str, text: str) -> Any:
    return Parameter(
        name=[short, long], group=_FLAGS, help=text, allow_leading_hyphen=True, negative=()
    )


@Parameter(name="*")
@dataclass(frozen=True)
class BenchFlags:
    """The flags of nccl-tests; what is None keeps its default."""

    min_bytes: Annotated[
        str | None, _flag("-b", "--minbytes", "Smallest size, also with K, M, G [32M].")
    ] = None
    max_bytes: Annotated[str | None, _flag("-e", "--maxbytes", "Largest size [32M].")] = None
    step_bytes: Annotated[
        str | None, _flag("-i", "--stepbytes", "From one size to the next [1M].")
    ] = None
    step_factor: Annotated[
        int | None, _flag("-f", "--stepfactor", "Multiply instead, by 2 for instance [off].")
    ] = None
    iters: Annotated[int | None, _flag("-n", "--iters", "Iterations per size [20].")] = None
    warmup_iters: Annotated[
        int | None, _flag("-w", "--warmup_iters", "Untimed ones at every doubled size [1].")
    ] = None
    agg_iters: Annotated[
        int | None, _flag("-m", "--agg_iters", "Operations per iteration [1].")
    ] = None
    run_cycles: Annotated[
        int | None, _flag("-N", "--run_cycles", "Times over all sizes; 0 = for ever [1].")
    ] = None
    checks: Annotated[
        int | None, _flag("-c", "--check", "Checks of the values per size; 0 = none [1].")
    ] = None
    redop: Annotated[str | None, _flag("-o", "--op", "sum, prod, max, min, avg or all [sum].")] = (
        None
    )
    datatype: Annotated[
        str | None,
        _flag(
            "-d",
            "--datatype",
            "int8, uint8, int32, uint32, int64, uint64, half, float, double, bfloat16, f8e4m3, "
            "f8e5m2 or all [float].",
        ),
    ] = None
    root: Annotated[str | None, _flag("-r", "--root", "Root; -1 or all = each [0].")] = None
    average: Annotated[
        int | None,
        _flag("-a", "--average", "Time: 0 rank 0's, 1 mean, 2 least, 3 greatest [1]."),
    ] = None
    blocking: Annotated[
        int | None,
        _flag(
            "-z",
            "--blocking",
            "0 all queued, 1 wait and barrier after each, 2 wait after each, 3 wait and untimed "
            "barrier after each iteration [0].",
        ),
    ] = None
    per_iter_timing: Annotated[
        int | None, _flag("-I", "--per_iter_timing", "1 = spread of the iterations [0].")
    ] = None
    per_iter_skip: Annotated[
        int | None, _flag("-K", "--per_iter_skip", "Iterations that -I leaves out [0].")
    ] = None
    report_cputime: Annotated[
        int | None, _flag("-C", "--report_cputime", "1 = time to start, not to end [0].")
    ] = None
    report_timestamps: Annotated[
        int | None, _flag("-S", "--report_timestamps", "1 = end rows with the time [0].")
    ] = None
    unalign: Annotated[
        int | None, _flag("-u", "--unalign", "Elements by which buffers are shifted [0].")
    ] = None
    timeout_s: Annotated[
        float | None, _flag("-T", "--timeout", "Seconds to wait in one operation [60].")
    ] = None
    parallel_init: Annotated[
        int | None, _flag("-p", "--parallel_init", "Ranks always form in parallel [0].")
    ] = None
    cudagraph: Annotated[
        int | None, _flag("-G", "--cudagraph", "CUDA graph launches; nccl-tests only [0].")
    ] = None
    local_register: Annotated[
        int | None, _flag("-R", "--local_register", "Buffer registration; nccl-tests only [0].")
    ] = None
    threads: Annotated[
        int | None, _flag("-t", "--nthreads", "Ranks are -t times -g without --ranks [1].")
    ] = None
    gpus: Annotated[
        int | None, _flag("-g", "--ngpus", "With nccl-tests the GPUs per thread [1].")
    ] = None
    output_file: Annotated[
        Path | None, _flag("-J", "--output_file", "Write nccl-tests' JSON to this file.")
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that were given, by their names in a job file."""
        not_settings = ("threads", "gpus", "output_file")
        given: dict[str, Any] = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None and field.name not in not_settings
        }
        for name in ("per_iter_timing", "report_cputime", "report_timestamps", "parallel_init"):
            if name in given:
                if given[name] not in (0, 1):
                    raise UsageError(f"{flag_of(name)} is {given[name]}; wanted 0 or 1")
                given[name] = bool(given[name])
        if "root" in given:
            given["root"] = _root(given["root"])
        minimum = os.environ.get(_MIN_BANDWIDTH_VARIABLE)
        if minimum is not None:
            given["min_busbw_gbs"] = _bandwidth(minimum)
        return given

    def num_ranks(self, ranks: int | None) -> int | None:
        """Return how many ranks were asked for; None if nobody said.

        Raises: UsageError when --ranks and -t -g disagree.
        """
        if self.threads is None and self.gpus is None:
            return ranks
        product = (self.threads or 1) * (self.gpus or 1)
        if ranks is not None and ranks != product:
            raise UsageError(
                f"--ranks {ranks} and -t {self.threads or 1} -g {self.gpus or 1} disagree; one "
                "process is one rank, so leave out -t and -g"
            )
        return product


def flag_of(name: str) -> str:
    """Return the flag that sets a field."""
    if name == "min_busbw_gbs":
        return f"${_MIN_BANDWIDTH_VARIABLE}"
    hints = {"operations": "OP", "implementation": "--implementation", "binaries": "--binaries"}
    if name in hints:
        return hints[name]
    hint = get_type_hints(BenchFlags, include_extras=True)[name]
    return str(hint.__metadata__[0].name[0])


def operations_of(text: str | None) -> list[str]:
    """Return the operations that the first argument names.

    Raises: UsageError.
    """
    from difflib import get_close_matches

    from gangline.comm.perf_sizes import OPERATIONS

    if text is None:
        return ["all_reduce"]
    if text == "all":
        return [name for name in OPERATIONS if name not in _NOT_OF_ALL]
    names = [name.removesuffix("_perf") for name in text.split(",")]
    for name in names:
        if name not in OPERATIONS:
            near = get_close_matches(name.replace("-", "_"), OPERATIONS, n=1)
            mend = f"did you mean {near[0]}?" if near else f"wanted {', '.join(OPERATIONS)} or all"
            raise UsageError(f"no operation {name!r}; {mend}")
    return names


def make_config(settings: dict[str, Any], num_ranks: int, gpus: int) -> CommBenchConfig:
    """Check the settings as a job file's are, and name the flags in what is wrong.

    Raises: UsageError.
    """
    from gangline.orchestrator.job import BenchJob, JobFileError, parse_job

    tree = {
        "kind": "bench",
        "workers": {"count": num_ranks, "gpus": gpus},
        "bench": settings,
    }
    try:
        job = parse_job(json.dumps(tree), check_paths=False)
    except JobFileError as error:
        lines = [
            f"{p.path}: found {p.found}; allowed: {p.allowed}; {p.mend}" for p in error.problems
        ]
        raise UsageError("\n".join(in_flags(line) for line in lines)) from None
    assert isinstance(job, BenchJob), "its kind is bench"
    return job.bench


def in_flags(text: str) -> str:
    """Return a text with the flags in place of the fields of a job file."""
    from gangline.monitoring.comm_bench_config import CommBenchConfig

    for name in sorted(CommBenchConfig.model_fields, key=len, reverse=True):
        text = text.replace(f"bench.{name}", flag_of(name))
    return text.replace("workers.count", "--ranks").replace("workers.gpus", "-g")


def _root(text: str) -> int:
    if text == "all":
        return -1
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"-r is {text!r}; wanted the number of a rank, or all") from None


def _bandwidth(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"${_MIN_BANDWIDTH_VARIABLE} is {text!r}; wanted a bandwidth in GB/s"
        ) from None


def reserve_output(path: Path | None) -> Path | None:
    """Make the file for the JSON: never over an old one, PATH.0, PATH.1, ... then.

    Raises: UsageError.
    """
    if path is None:
        return None
    if path.suffix.lower() != ".json":
        raise UsageError(f"-J is {path}; wanted a name that ends in .json")
    number = -1
    while True:
        candidate = path if number < 0 else path.with_name(f"{path.name}.{number}")
        try:
            candidate.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise GanglineError(f"-J: {candidate} cannot be written: {error.strerror}") from error
        else:
            return candidate
