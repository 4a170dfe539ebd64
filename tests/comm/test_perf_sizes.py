"""Sizes, rounding and bus bandwidths against the table in nccl-tests' documentation."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.comm.perf_sizes import (
    OPERATIONS,
    TYPES,
    WORD_BYTES,
    Counts,
    bandwidths_gbs,
    counts_of,
    redop_column,
    sizes_between,
    uneven_counts,
)

# doc/PERFORMANCE.md of nccl-tests: bus bandwidth over algorithm bandwidth.
FACTORS = {
    "all_reduce": lambda n: Fraction(2 * (n - 1), n),
    "all_gather": lambda n: Fraction(n - 1, n),
    "reduce_scatter": lambda n: Fraction(n - 1, n),
    "alltoall": lambda n: Fraction(n - 1, n),
    "alltoallv": lambda n: Fraction(n - 1, n),
    "gather": lambda n: Fraction(n - 1, n),
    "scatter": lambda n: Fraction(n - 1, n),
    "broadcast": lambda n: Fraction(1),
    "reduce": lambda n: Fraction(1),
    "sendrecv": lambda n: Fraction(1),
    "hypercube": lambda n: Fraction(1),
}
SPLIT = ("all_gather", "reduce_scatter", "alltoall", "gather", "scatter", "hypercube")


def test_the_table_is_whole():
    assert set(FACTORS) == set(OPERATIONS)
    assert set(WORD_BYTES) == set(TYPES)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 1000])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bus_bandwidth(operation, n):
    counts = counts_of(operation, 10**8, 4, n)
    algorithm, bus = bandwidths_gbs(operation, counts, 4, 0.5, n)
    assert bus == pytest.approx(algorithm * float(FACTORS[operation](n)))
    size = max(counts.send, counts.recv) * 4
    if operation == "hypercube":
        size = (n - 1) * counts.parameter * 4
    assert algorithm == pytest.approx(size / 1e9 / 0.5)


def test_one_rank_has_no_bus_bandwidth():
    assert bandwidths_gbs("all_reduce", Counts(8, 8, 8), 4, 1.0, 1)[1] == 0
    assert bandwidths_gbs("all_gather", Counts(8, 8, 8), 4, 1.0, 1)[1] == 0


@pytest.mark.parametrize(
    ("operation", "counts"),
    [
        ("all_reduce", Counts(103, 103, 103)),
        ("broadcast", Counts(103, 103, 103)),
        ("reduce", Counts(103, 103, 103)),
        ("sendrecv", Counts(103, 103, 103)),
        # 103 floats over 3 ranks: 34 each, rounded down to 32 = 8 pieces of 16 bytes.
        ("all_gather", Counts(32, 96, 32, send_offset=32)),
        ("hypercube", Counts(32, 96, 32, send_offset=32)),
        ("gather", Counts(32, 96, 32, send_offset=32)),
        ("reduce_scatter", Counts(96, 32, 32, recv_offset=32)),
        ("scatter", Counts(96, 32, 32, recv_offset=32)),
        ("alltoall", Counts(96, 96, 32)),
        # Distances 0, 1, 2 of 384 bytes: nothing, 128 and 256 bytes.
        ("alltoallv", Counts(96, 96, 32)),
    ],
)
def test_counts(operation, counts):
    assert counts_of(operation, 103, 4, 3) == counts


@given(
    count=st.integers(0, 10**9),
    word=st.sampled_from([1, 2, 4, 8]),
    n=st.integers(1, 64),
    operation=st.sampled_from(SPLIT),
)
def test_parts_are_whole_pieces_and_as_many_as_fit(count, word, n, operation):
    part = counts_of(operation, count, word, n).parameter
    assert part * word % 16 == 0
    assert part * n <= count
    assert (part + 16 // word) * n > count


@given(parameter=st.integers(0, 10**6), word=st.sampled_from([1, 2, 4, 8]), n=st.integers(1, 16))
def test_the_uneven_exchange_is_the_same_for_every_rank(parameter, word, n):
    per_distance = uneven_counts(parameter, word, n)
    assert len(per_distance) == n
    assert per_distance == sorted(per_distance)
    assert per_distance[0] == 0 or n == 1
    assert all(count * word % 16 == 0 for count in per_distance)
    assert sum(per_distance) <= parameter * n


def test_sizes():
    assert sizes_between(8, 64, step_bytes=1, step_factor=2) == [8, 16, 32, 64]
    assert sizes_between(10, 35, step_bytes=10, step_factor=1) == [10, 20, 30]
    assert sizes_between(8, 8, step_bytes=1, step_factor=1) == [8]


def test_what_stands_in_the_operator_column():
    assert redop_column("all_reduce", "max") == "max"
    assert redop_column("sendrecv", "sum") == "sum"
    assert redop_column("broadcast", "sum") == "none"
    assert redop_column("hypercube", "sum") == ""
