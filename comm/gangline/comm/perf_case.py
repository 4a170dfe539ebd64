"""One benchmarked operation: what it is, and on which elements."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gangline.comm.handle import Handle
from gangline.comm.mesh import Mesh
from gangline.comm.perf_sizes import Counts, uneven_counts

Implementation = Literal["torch", "gangline"]

AXIS = "world"
DTYPES: dict[str, torch.dtype] = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "uint32": torch.int32,
    "int64": torch.int64,
    "uint64": torch.int64,
    "half": torch.float16,
    "float": torch.float32,
    "double": torch.float64,
    "bfloat16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Case:
    """What is measured: one operation, on elements of one type."""

    operation: str
    implementation: Implementation
    type_name: str
    redop: str
    root: int
    counts: Counts

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the tensors: the signed one of the same width for an unsigned one."""
        return DTYPES[self.type_name]


# Start a case: what is sent, what is received.
Run = Callable[[Case, Tensor, Tensor, Mesh], Handle]


def copy(source: Tensor, target: Tensor) -> None:
    """Copy, unless both are the same memory."""
    if source.numel() and source.data_ptr() != target.data_ptr():
        target.copy_(source)


def uneven_rows(case: Case, mesh: Mesh) -> tuple[list[int], list[int]]:
    """Return the bytes that this rank sends to each rank and gets from each in alltoallv."""
    n, rank, word = mesh.world_size, mesh.rank, case.dtype.itemsize
    per_distance = [c * word for c in uneven_counts(case.counts.parameter, word, n)]
    return (
        [per_distance[(place - rank) % n] for place in range(n)],
        [per_distance[(rank - place) % n] for place in range(n)],
    )
