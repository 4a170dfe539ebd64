"""What each operation of nccl-tests sends, how its sizes are rounded, and its bus bandwidth.

operation                      size column        count column       bus factor    redop / root
all_reduce                     bytes              elements           2 (N-1)/N     op / -1
all_gather                     N x a rank's       a rank's elements  (N-1)/N       none / -1
reduce_scatter                 N x a rank's       a rank's elements  (N-1)/N       op / -1
alltoall                       all of a rank's    elements per peer  (N-1)/N       none / -1
gather, scatter                N x a rank's       a rank's elements  (N-1)/N       none / root
broadcast, reduce              bytes              elements           1             none, op / root
sendrecv (to the next rank)    bytes              elements           1             op / -1
hypercube (an all-gather)      N x a rank's       a rank's elements  1 of N-1 parts  "" / -1
alltoallv (uneven)             the largest sum    mean per peer      (N-1)/N       none / -1

Bus bandwidth is what one rank's link carries in one direction; it can be compared with the line
rate whatever the operation and the number of ranks. GB = 1e9 bytes. What is split over the ranks
is rounded down to whole pieces of 16 bytes per rank, so a printed size may be below the asked one.

Source: NVIDIA nccl-tests 2.19.6 (doc/PERFORMANCE.md, src/*.cu), written anew. Torch-free.

N = ranks
"""

from dataclasses import dataclass
from typing import Literal, get_args

OperationName = Literal[
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "alltoall",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "sendrecv",
    "hypercube",
    "alltoallv",
]
TypeName = Literal[
    "int8",
    "uint8",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "half",
    "float",
    "double",
    "bfloat16",
    "f8e4m3",
    "f8e5m2",
]
ReduceOpName = Literal["sum", "prod", "max", "min", "avg"]

OPERATIONS: tuple[OperationName, ...] = get_args(OperationName)
TYPES: tuple[TypeName, ...] = get_args(TypeName)
REDUCE_OPS: tuple[ReduceOpName, ...] = get_args(ReduceOpName)

WORD_BYTES: dict[str, int] = {
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "half": 2,
    "float": 4,
    "double": 8,
    "bfloat16": 2,
    "f8e4m3": 1,
    "f8e5m2": 1,
}

REDUCING = frozenset({"all_reduce", "reduce_scatter", "reduce"})
ROOTED = frozenset({"broadcast", "reduce", "gather", "scatter"})
# In place they would overwrite what they still have to send: timed, and not checked.
UNCHECKED_IN_PLACE = frozenset({"alltoall", "alltoallv", "sendrecv"})

_PIECE_BYTES = 16


@dataclass(frozen=True)
class Counts:
    """Elements of one operation on one rank.

    In place, the sent block begins at `send_offset * rank` of the receive buffer and the received
    one at `recv_offset * rank`. `parameter` is what the count column shows.
    """

    send: int
    recv: int
    parameter: int
    send_offset: int = 0
    recv_offset: int = 0


def counts_of(operation: str, count: int, word_bytes: int, num_ranks: int) -> Counts:
    """Return what an operation sends and receives when it is asked for `count` elements."""
    part = count // num_ranks // (_PIECE_BYTES // word_bytes) * (_PIECE_BYTES // word_bytes)
    match operation:
        case "all_reduce" | "broadcast" | "reduce" | "sendrecv":
            return Counts(count, count, count)
        case "all_gather" | "hypercube" | "gather":
            return Counts(part, part * num_ranks, part, send_offset=part)
        case "reduce_scatter" | "scatter":
            return Counts(part * num_ranks, part, part, recv_offset=part)
        case "alltoall":
            return Counts(part * num_ranks, part * num_ranks, part)
        case "alltoallv":
            total = sum(uneven_counts(part, word_bytes, num_ranks))
            return Counts(total, total, part)
    raise ValueError(f"operation is {operation!r}; wanted one of {', '.join(OPERATIONS)}")


def uneven_counts(parameter: int, word_bytes: int, num_ranks: int) -> list[int]:
    """Return the elements that alltoallv sends to the rank d places further on, for every d.

    They grow with d and come to about `parameter` per peer; every rank sends and receives the
    same total. A rank sends nothing to itself.
    """
    total_bytes = parameter * num_ranks * word_bytes
    if num_ranks == 1:
        return [total_bytes // _PIECE_BYTES * _PIECE_BYTES // word_bytes]
    sum_distances = num_ranks * (num_ranks - 1) // 2
    per_distance = [float(d) * total_bytes / sum_distances for d in range(num_ranks)]
    return [int(size) // _PIECE_BYTES * _PIECE_BYTES // word_bytes for size in per_distance]


def bandwidths_gbs(
    operation: str, counts: Counts, word_bytes: int, seconds: float, num_ranks: int
) -> tuple[float, float]:
    """Return algorithm and bus bandwidth of one operation that took `seconds`.

    Units: GB/s, GB = 1e9 bytes.
    """
    n = num_ranks
    factor = 1.0
    match operation:
        case "all_reduce":
            size, factor = counts.parameter, 2 * (n - 1) / n
        case "broadcast" | "reduce" | "sendrecv":
            size = counts.parameter
        case "hypercube":
            size = counts.parameter * (n - 1)
        case "alltoallv":
            size, factor = max(counts.send, counts.recv), (n - 1) / n
        case _:
            size, factor = counts.parameter * n, (n - 1) / n
    algorithm = size * word_bytes / 1e9 / seconds if seconds > 0 else 0.0
    return algorithm, algorithm * factor


def redop_column(operation: str, redop: str) -> str:
    """Return what nccl-tests prints in the column `redop`."""
    if operation in REDUCING or operation == "sendrecv":
        return redop
    return "" if operation == "hypercube" else "none"


def sizes_between(
    min_bytes: int, max_bytes: int, *, step_bytes: int, step_factor: int
) -> list[int]:
    """Return the sizes to measure: by a factor if it is above 1, else by `step_bytes`."""
    sizes = []
    size = min_bytes
    while size <= max_bytes:
        sizes.append(size)
        size = size * step_factor if step_factor > 1 else size + step_bytes
    return sizes
