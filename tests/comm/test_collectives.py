"""Collectives, on 1 to 4 ranks."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gangline.comm import collectives
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
@pytest.mark.parametrize(("world_size", "degree"), [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_every_exchange_on_every_axis(rank_pool, world_size, degree):
    rank_pool.run(world_size, (SCENARIOS, "use_all_exchanges"), expert_parallel=degree)


@pytest.mark.ranks
@pytest.mark.parametrize("hosts", ["aaa", "aba", "abc"])
def test_messages_and_bytes_are_counted_by_class_of_link(rank_pool, hosts):
    found = rank_pool.run(3, (SCENARIOS, "count_what_is_sent"), hosts=hosts)
    for rank, counts in enumerate(found):

        def expected(bytes_to, rank=rank):
            links: dict[str, list[int]] = {}
            for place, num_bytes in enumerate(bytes_to):
                link = "local" if place == rank else "intra_host"
                if hosts[place] != hosts[rank]:
                    link = "inter_host"
                if num_bytes:
                    messages, total = links.get(link, [0, 0])
                    links[link] = [messages + 1, total + num_bytes]
            return links

        assert counts["exchange_counts"] == expected([24, 24, 24])
        assert counts["exchange_rows"] == expected([0, 20, 40])
        assert counts["reduce_scatter"] == expected([24, 24, 24])
        assert counts["ring"] == expected([72 * (place == (rank + 1) % 3) for place in range(3)])
        assert counts["all_reduce"] == {}


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


def test_one_rank_takes_the_same_path_and_sends_nothing():
    mesh = Mesh.single()
    x = torch.randn(5, 3, requires_grad=True)
    y = collectives.all_to_all(x, [5], [5], mesh, "ep")
    assert torch.equal(y, x)
    collectives.all_reduce(y.detach(), mesh, "world").wait()
    assert collectives.exchange_json([1, "a"], mesh, "world") == [[1, "a"]]
    assert torch.equal(collectives.all_gather(x, mesh, "dp"), x.detach().unsqueeze(0))
    assert torch.equal(collectives.exchange_counts(torch.ones(1, 4), mesh, "ep"), torch.ones(1, 4))
    torch.autograd.gradcheck(
        lambda x: collectives.all_to_all(x, [5], [5], mesh, "ep"),
        (x.detach().double().requires_grad_(),),
    )


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 4])
def test_axes_of_the_same_ranks_do_not_take_each_others_messages(rank_pool, world_size):
    rank_pool.run(
        world_size,
        (SCENARIOS, "exchanges_of_two_axes_do_not_mix"),
        expert_parallel=world_size,
    )
