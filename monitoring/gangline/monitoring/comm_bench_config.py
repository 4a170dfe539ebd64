"""What a benchmark of collectives measures: nccl-tests' flags as settings. Torch-free.

Every field says which flag it is. What only NVIDIA's own binaries can do is refused for the other
implementations, never ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from gangline.comm.perf_sizes import ROOTED, OperationName, ReduceOpName, TypeName, sizes_between

BenchImplementation = Literal["gangline", "torch", "nccl-tests"]

MAX_BYTES = 1 << 40
MAX_SIZES = 10_000
SIZE_PATTERN = r"^[0-9]{1,15}(?:\.[0-9]{1,6})?[KMGkmg]?$"
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_MIB = 1 << 20
# Settings whose value is the value of a flag.
_FLAGS = {
    "agg_iters": "-m",
    "run_cycles": "-N",
    "checks": "-c",
    "average": "-a",
    "blocking": "-z",
    "per_iter_timing": "-I",
    "per_iter_skip": "-K",
    "report_cputime": "-C",
    "report_timestamps": "-S",
    "unalign": "-u",
    "datatype": "-d",
    "redop": "-o",
    "root": "-r",
    "parallel_init": "-p",
    "cudagraph": "-G",
    "local_register": "-R",
}
# What stands in for a list: every type, operator or root that there is.
ALL = "all"
ALL_ROOTS = -1


def parse_size(value: Any) -> Any:
    """Return the bytes that a size stands for: a number, or text such as 64K, 1.5M or 2G.

    K, M and G are powers of 1024, as for nccl-tests. What is no text is returned as it is.

    Raises: ValueError.
    """
    if not isinstance(value, str):
        return value
    if re.fullmatch(SIZE_PATTERN, value) is None:
        raise ValueError(
            "a size is a number of bytes, or one with K, M or G; write for example 64K"
        )
    number, unit = (value[:-1], value[-1]) if value[-1].isalpha() else (value, "")
    return int(float(number) * _UNITS[unit.lower()])


Size = Annotated[
    int,
    Field(ge=1, le=MAX_BYTES),
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MAX_BYTES},
                {"type": "string", "pattern": SIZE_PATTERN},
            ]
        }
    ),
]


class CommBenchConfig(BaseModel):
    """Choose the operations, sizes and way of measuring; the defaults are nccl-tests'."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    operations: list[OperationName] = Field(
        default=["all_reduce"],
        min_length=1,
        max_length=16,
        description="What to measure, one table each.",
    )
    implementation: BenchImplementation = Field(
        default="gangline",
        description="gangline: as our own code communicates; torch: plain torch.distributed; "
        "nccl-tests: NVIDIA's binaries, on the GPUs of each worker by itself.",
    )
    min_bytes: Size = Field(default=32 * _MIB, description="Smallest size, 1K to 1G (-b).")
    max_bytes: Size = Field(default=32 * _MIB, description="Largest size (-e).")
    step_bytes: Size = Field(default=_MIB, description="From one size to the next (-i).")
    step_factor: int = Field(
        default=1, ge=1, le=1024, description="Multiply instead where it is above 1 (-f)."
    )
    iters: int = Field(default=20, ge=1, le=10**6, description="Iterations per size (-n).")
    warmup_iters: int = Field(
        default=1, ge=0, le=10**6, description="Untimed ones at every doubled size (-w)."
    )
    agg_iters: int = Field(default=1, ge=1, le=10**4, description="Operations per iteration (-m).")
    run_cycles: int = Field(
        default=1, ge=0, le=10**6, description="Times to go over all sizes; 0 = until stopped (-N)."
    )
    checks: int = Field(
        default=1, ge=0, le=10**4, description="Checks of the values per size; 0 = none (-c)."
    )
    datatype: TypeName | Literal["all"] = Field(
        default="float", description="Type of the elements (-d)."
    )
    redop: ReduceOpName | Literal["all"] = Field(
        default="sum", description="Operator of the reductions (-o)."
    )
    root: int = Field(
        default=0, ge=ALL_ROOTS, le=16383, description="Root, where there is one; -1 = each (-r)."
    )
    average: int = Field(
        default=1,
        ge=0,
        le=3,
        description="Time shown: 0 rank 0's, 1 the ranks' mean, 2 the least, 3 the greatest (-a).",
    )
    blocking: int = Field(
        default=0,
        ge=0,
        le=3,
        description="0 all queued, 1 wait and barrier after each, 2 wait after each, 3 wait and "
        "an untimed barrier after each iteration (-z).",
    )
    per_iter_timing: bool = Field(
        default=False, description="Also the spread of the single iterations (-I)."
    )
    per_iter_skip: int = Field(
        default=0, ge=0, le=10**6, description="First iterations that the spread leaves out (-K)."
    )
    report_cputime: bool = Field(
        default=False, description="Show the time to start an operation, not its duration (-C)."
    )
    report_timestamps: bool = Field(default=False, description="End each row with the time (-S).")
    unalign: int = Field(
        default=0, ge=0, le=4096, description="Elements by which the buffers are shifted (-u)."
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        le=7 * 86400,
        description="Longest wait in one operation, in seconds; null = faults.comm_timeout_s (-T).",
    )
    min_busbw_gbs: float | None = Field(
        default=None,
        gt=0,
        le=10**6,
        description="Bus bandwidth of which 9/10 must be reached on average, in GB/s, else the "
        "job fails; null = any will do ($NCCL_TESTS_MIN_BW).",
    )
    parallel_init: bool = Field(
        default=False,
        description="Form communicators in parallel (-p); one worker per rank always does.",
    )
    cudagraph: int = Field(
        default=0, ge=0, le=10**6, description="Launches of a CUDA graph; nccl-tests only (-G)."
    )
    local_register: int = Field(
        default=0, ge=0, le=2, description="Registration of buffers; nccl-tests only (-R)."
    )
    binaries: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="Folder of NVIDIA's binaries on the workers; null = those on their PATH.",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        # A job file with faults elsewhere is checked with its values as they are written.
        least, most, step = (
            parse_size(size) for size in (self.min_bytes, self.max_bytes, self.step_bytes)
        )
        if least > most:
            raise ValueError(
                f"bench.min_bytes {self.min_bytes} is more than bench.max_bytes {self.max_bytes}; "
                f"set bench.max_bytes to at least {self.min_bytes}"
            )
        if self.step_factor == 1 and (most - least) // step >= MAX_SIZES:
            raise ValueError(
                f"bench.step_bytes {self.step_bytes} makes {(most - least) // step + 1} sizes from "
                "bench.min_bytes to bench.max_bytes; raise it, or set bench.step_factor to 2"
            )
        return self

    @model_validator(mode="after")
    def _skip_fits(self) -> Self:
        if self.per_iter_skip and not self.per_iter_timing:
            raise ValueError(
                f"bench.per_iter_skip {self.per_iter_skip} leaves out of what is not measured; "
                "set bench.per_iter_timing to true"
            )
        if self.per_iter_skip >= self.iters:
            raise ValueError(
                f"bench.per_iter_skip {self.per_iter_skip} leaves none of bench.iters "
                f"{self.iters}; set bench.per_iter_skip to at most {self.iters - 1}"
            )
        return self

    @model_validator(mode="after")
    def _only_for_the_binaries(self) -> Self:
        if self.implementation == "nccl-tests":
            return self
        for name in ("cudagraph", "local_register", "binaries"):
            if value := getattr(self, name):
                raise ValueError(
                    f"bench.{name} {value} is for NVIDIA's binaries, and bench.implementation is "
                    f"{self.implementation}; remove bench.{name}, or set bench.implementation to "
                    "nccl-tests"
                )
        return self

    def flags(self) -> list[str]:
        """Return nccl-tests' flags for these settings: sizes, counts, and what is no default."""
        default = CommBenchConfig()
        flags = ["-b", str(self.min_bytes), "-e", str(self.max_bytes)]
        if self.step_factor > 1:
            flags += ["-f", str(self.step_factor)]
        elif self.step_bytes != default.step_bytes:
            flags += ["-i", str(self.step_bytes)]
        # Given always, since the default of -w has changed.
        flags += ["-n", str(self.iters), "-w", str(self.warmup_iters)]
        for name, flag in _FLAGS.items():
            value = getattr(self, name)
            if value != getattr(default, name):
                flags += [flag, str(int(value) if isinstance(value, bool) else value)]
        if self.timeout_s is not None:
            flags += ["-T", str(max(1, round(self.timeout_s)))]
        return flags

    def sizes(self) -> list[int]:
        """Return the sizes to measure, in bytes."""
        return sizes_between(
            self.min_bytes,
            self.max_bytes,
            step_bytes=self.step_bytes,
            step_factor=self.step_factor,
        )

    def check_ranks(self, num_ranks: int) -> None:
        """Check what depends on the number of ranks.

        Raises: ValueError.
        """
        rooted = sorted(ROOTED.intersection(self.operations))
        if self.root >= num_ranks and rooted and self.implementation != "nccl-tests":
            raise ValueError(
                f"bench.root {self.root} is no rank of {num_ranks} (workers.count); set bench.root "
                f"to at most {num_ranks - 1}"
            )
