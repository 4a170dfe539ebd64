"""The benchmarked operations: right on every rank, and their check sees what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gangline.comm.mesh import Mesh
from gangline.comm.perf_case import DTYPES, Case
from gangline.comm.perf_check import Values, _mix
from gangline.comm.perf_sizes import Counts

SCENARIOS = Path(__file__).with_name("perf_scenarios.py")


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_operation_is_right_from_every_root_and_in_both_places(rank_pool, world_size):
    found = rank_pool.run(
        world_size, (SCENARIOS, "run_everything"), num_bytes=4096, unalign=0, timeout_s=120
    )
    assert set(found[0].values()) == {0}, found[0]
    assert all(other == found[0] for other in found)
    num_operations = 11 if world_size != 3 else 10
    assert len({name.rsplit(" ", 2)[0] for name in found[0]}) == 2 * num_operations


@pytest.mark.ranks
@pytest.mark.parametrize(("num_bytes", "unalign"), [(20, 0), (4, 3), (300_000, 1)])
def test_odd_sizes_and_unaligned_buffers(rank_pool, num_bytes, unalign):
    found = rank_pool.run(
        3, (SCENARIOS, "run_everything"), num_bytes=num_bytes, unalign=unalign, timeout_s=120
    )
    assert set(found[0].values()) == {0}


@pytest.mark.ranks
def test_every_type_that_a_backend_reduces_is_right(rank_pool):
    can = rank_pool.run(2, (SCENARIOS, "run_types"), timeout_s=120)[0]
    plain = ("int8", "uint8", "int32", "int64", "half", "float", "double")
    for type_name in plain:
        for redop in ("sum", "prod", "max", "min"):
            assert f"{type_name} {redop}" in can["torch all_reduce"]
            assert f"{type_name} {redop}" in can["gangline reduce"]
    assert "int32 avg" not in can["torch all_reduce"], "gloo has no mean of whole numbers"
    assert "f8e4m3 sum" not in can["torch all_reduce"]
    assert "uint64 max" not in can["torch all_reduce"]
    assert can["gangline reduce_scatter"]
    assert all(name.endswith("sum") for name in can["gangline reduce_scatter"])


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
def test_one_wrong_element_is_seen(rank_pool, world_size):
    seen = rank_pool.run(world_size, (SCENARIOS, "see_corruption"))
    assert min(seen) > 60


@pytest.mark.ranks
def test_blocks_in_each_others_place_are_wrong(rank_pool):
    rank_pool.run(2, (SCENARIOS, "swap_blocks"))


@pytest.mark.ranks
def test_all_ranks_hear_of_one_rank_s_wrong_values(rank_pool):
    found = rank_pool.run(3, (SCENARIOS, "measure_with_a_liar"), liar=1)
    assert found == [[3, 1]] * 3
    assert rank_pool.run(3, (SCENARIOS, "measure_with_a_liar"), liar=9) == [[0, 0]] * 3


@pytest.mark.ranks
def test_every_check_is_on_values_of_its_own(rank_pool):
    # So that what an earlier operation left in the buffers is never right.
    noted = rank_pool.run(2, (SCENARIOS, "note_repetitions"))
    assert noted[0] == noted[1], "the ranks must agree"
    first, *checks = noted[0][:4]
    again, *more = noted[0][4:]
    assert first == again
    assert len({first, *checks, *more}) == 7


@pytest.mark.ranks
def test_ways_to_wait_and_to_average(rank_pool):
    found = rank_pool.run(2, (SCENARIOS, "measure_ways"))
    for blocking in range(4):
        time_s, iter_s, cpu_s = found[0][f"blocking {blocking}"]
        assert len(iter_s) == 2
        assert all(len(row) == 4 for row in iter_s), "four iterations of three operations"
        # The iterations of a rank make up its whole time; the greatest rank's is shown.
        slowest_s = max(sum(row) for row in iter_s) / 4
        assert slowest_s <= time_s * 1.05
        assert 0 < cpu_s <= time_s * 1.0001 or blocking
    for average in range(4):
        assert found[0][f"average {average}"] == found[1][f"average {average}"], "on all ranks"
    assert found[0]["num_done"] == 4 * (4 * 3 + 1)


@pytest.mark.ranks
def test_no_more_is_under_way_than_allowed(rank_pool):
    assert rank_pool.run(2, (SCENARIOS, "keep_few_in_flight")) == [4, 4]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("num_elements", "dtype", "op"),
    [
        (0, "float32", "sum"),
        (1, "int8", "max"),
        (70_001, "float64", "sum"),
        (9, "bfloat16", "prod"),
    ],
)
def test_chain(rank_pool, world_size, num_elements, dtype, op):
    rank_pool.run(world_size, (SCENARIOS, "chain"), num_elements=num_elements, dtype=dtype, op=op)


@pytest.mark.ranks
def test_a_dead_rank_breaks_the_chain_for_all(rank_pool):
    found = rank_pool.run(3, (SCENARIOS, "chain_with_a_dead_link"), may_die=(1,))
    assert found[0].endswith("Error")
    assert found[2].endswith("Error")


def case_of(type_name: str, redop: str, num_elements: int) -> Case:
    counts = Counts(num_elements, num_elements, num_elements)
    return Case("all_reduce", "torch", type_name, redop, 0, counts)


class Ranks(Mesh):
    """A mesh that only says how many ranks there are."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.device = torch.device("cpu")


@pytest.mark.parametrize("world_size", [2, 3, 7, 16, 64])
@pytest.mark.parametrize("redop", ["sum", "prod", "max", "min"])
@pytest.mark.parametrize("type_name", sorted(set(DTYPES) - {"f8e4m3", "f8e5m2"}))
def test_values_have_one_result_in_every_order(type_name, redop, world_size):
    case = case_of(type_name, redop, 257)
    merge: Any = {
        "sum": torch.add, "prod": torch.mul, "max": torch.maximum, "min": torch.minimum,
    }[redop]  # fmt: skip
    sent = []
    for rank in range(world_size):
        send, recv = torch.empty(257, dtype=case.dtype), torch.empty(257, dtype=case.dtype)
        Values(case, Ranks(rank, world_size)).fill(send, recv, repetition=3)
        sent.append(send)
    order = torch.randperm(world_size, generator=torch.Generator().manual_seed(1)).tolist()
    total = sent[order[0]].clone()
    for rank in order[1:]:
        total = merge(total, sent[rank])
    check = Values(case, Ranks(0, world_size))
    assert check.num_wrong(total, repetition=3, in_place=False) == 0
    if redop == "sum":
        # A rank that is left out is seen at once.
        assert check.num_wrong(total - sent[-1], repetition=3, in_place=False) > 50


def test_values_differ_from_place_to_place_and_rank_to_rank():
    index = torch.arange(10_000)
    a, b = _mix(index, 5) % 1000, _mix(index, 6) % 1000
    assert (a[1:] != a[:-1]).float().mean() > 0.99
    assert (a != b).float().mean() > 0.99
    assert len(torch.unique(a)) == 1000
    far = _mix(index + (1 << 33), 5) % 1000
    assert (a != far).float().mean() > 0.99
