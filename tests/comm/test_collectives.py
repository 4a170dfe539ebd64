"""Collectives and the token exchange, on 1 to 4 ranks."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gangline.comm import collectives, token_exchange
from gangline.comm.mesh import Mesh

SCENARIOS = Path(__file__).with_name("comm_scenarios.py")
# The pool of ranks outlives the examples on purpose.
many_cases = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "degree"), [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_every_collective_on_every_axis(rank_pool, world_size, degree):
    rank_pool.run(world_size, (SCENARIOS, "use_all_collectives"), expert_parallel=degree)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sums_are_bit_identical_on_all_ranks(rank_pool, world_size):
    rank_pool.run(world_size, (SCENARIOS, "sum_is_the_same_everywhere"))


@pytest.mark.ranks
@many_cases
@given(data=st.data())
def test_ragged_rows_and_their_gradients_find_their_way(rank_pool, data):
    world_size = data.draw(st.integers(1, 4))
    counts = st.lists(st.integers(0, 5), min_size=world_size, max_size=world_size)
    rows = data.draw(st.lists(counts, min_size=world_size, max_size=world_size))
    rank_pool.run(
        world_size,
        (SCENARIOS, "exchange_rows"),
        rows=rows,
        dim=data.draw(st.sampled_from([1, 7])),
        dtype=data.draw(st.sampled_from(["float32", "float64", "bfloat16"])),
    )


@pytest.mark.ranks
@many_cases
@given(data=st.data())
def test_experts_see_all_rows_by_source_in_order(rank_pool, data):
    world_size = data.draw(st.integers(1, 4))
    num_local = data.draw(st.integers(1, 3))
    num_experts = world_size * num_local
    counts = st.lists(st.integers(0, 4), min_size=num_experts, max_size=num_experts)
    table = data.draw(st.lists(counts, min_size=world_size, max_size=world_size))
    found = rank_pool.run(
        world_size,
        (SCENARIOS, "round_trip"),
        expert_parallel=world_size,
        counts=table,
        dim=2,
    )
    for rank, result in enumerate(found):
        experts = range(rank * num_local, (rank + 1) * num_local)
        wanted = [
            [float(source), float(expert), float(place)]
            for expert in experts
            for source in range(world_size)
            for place in range(table[source][expert])
        ]
        assert result["seen"] == wanted
        assert result["rows_per_expert"] == [sum(row[e] for row in table) for e in experts]


def test_one_rank_takes_the_same_path_and_sends_nothing():
    mesh = Mesh.single()
    x = torch.randn(5, 3, requires_grad=True)
    y = collectives.all_to_all(x, [5], [5], mesh, "ep")
    assert torch.equal(y, x)
    collectives.all_reduce(y.detach(), mesh, "world").wait()
    assert collectives.exchange_json([1, "a"], mesh, "world") == [[1, "a"]]
    assert torch.equal(collectives.all_gather(x, mesh, "dp"), x.detach().unsqueeze(0))
    assert torch.equal(collectives.exchange_counts(torch.ones(1, 4), mesh, "ep"), torch.ones(1, 4))
    rows, way = token_exchange.dispatch(x, torch.tensor([2, 3]), mesh)
    assert rows is x
    assert token_exchange.combine(rows, way) is x
    torch.autograd.gradcheck(
        lambda x: collectives.all_to_all(x, [5], [5], mesh, "ep"),
        (x.detach().double().requires_grad_(),),
    )
