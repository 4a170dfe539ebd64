"""Every kind of token exchange, on ranks: rows, messages, gradients, memory, and faults.

That outputs and gradients are bit for bit those of the dense layer is in
tests/trainers/test_moe.py.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gangline.comm.token_exchange_flat import cut

SCENARIOS = Path(__file__).with_name("token_exchange_scenarios.py")
EXCHANGES = ("all_to_all", "all_gather", "hierarchical", "deduplicated", "chunked")
# The pool of ranks outlives the examples on purpose.
few_cases = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# ---- the layout of rows


def draw_ids(data, world_size, num_experts, *, max_tokens=6):
    """Return the experts of each token of each rank; ragged, also none, and some experts never."""
    top_k = data.draw(st.integers(1, min(3, num_experts)))
    choices = st.lists(
        st.integers(0, num_experts - 1) | st.just(0), min_size=top_k, max_size=top_k, unique=True
    )
    return [
        data.draw(st.lists(choices, min_size=0, max_size=max_tokens)) for _ in range(world_size)
    ]


@pytest.mark.ranks
@few_cases
@given(data=st.data())
def test_experts_see_all_rows_by_source_in_order(rank_pool, data):
    world_size = data.draw(st.integers(1, 4))
    num_local = data.draw(st.integers(1, 3))
    ids = draw_ids(data, world_size, world_size * num_local)
    found = rank_pool.run(
        world_size,
        (SCENARIOS, "round_trip"),
        expert_parallel=world_size,
        hosts=[data.draw(st.sampled_from("ab")) for _ in range(world_size)],
        ids=ids,
        num_experts=world_size * num_local,
        many=data.draw(st.booleans()),
    )
    for rank, seen in enumerate(found):
        wanted = [
            [
                [float(source), float(token)]
                for source, of_rank in enumerate(ids)
                for token, chosen in enumerate(of_rank)
                if expert in chosen
            ]
            for expert in range(rank * num_local, (rank + 1) * num_local)
        ]
        assert seen == dict.fromkeys(EXCHANGES, wanted)


# ---- messages and bytes


def partner(hosts, place, host):
    """The formula of host_layout.py, once more."""
    here = [p for p, h in enumerate(hosts) if h == hosts[place]]
    there = [p for p, h in enumerate(hosts) if h == host]
    return there[here.index(place) % len(there)]


def expected_traffic(kind, hosts, ids, num_experts, *, many):
    """Count what each rank sends in forward and backward, message by message, by the definition."""
    num_ranks, row_bytes = len(hosts), 4 * 4
    num_local = num_experts // num_ranks
    everyone = range(num_ranks)
    sent = [{"intra_host": [0, 0], "inter_host": [0, 0]} for _ in everyone]

    def send(source, to, num_bytes):
        if source != to and num_bytes:
            link = "intra_host" if hosts[source] == hosts[to] else "inter_host"
            sent[source][link][0] += 1
            sent[source][link][1] += num_bytes

    def chosen_of(source):
        return [expert for chosen in ids[source] for expert in chosen]

    def rows(source, to, experts=None):
        experts = experts or range(num_local)
        wanted = {to * num_local + expert for expert in experts}
        return sum(expert in wanted for expert in chosen_of(source))

    if kind in ("all_to_all", "chunked", "all_gather"):
        chunks = cut(num_local, 2 if kind == "chunked" else 1)
        for i in everyone:
            for j in everyone:
                send(i, j, 8 * (num_local + (kind == "all_gather")))
                for experts in [range(c.start, c.stop) for c in chunks]:
                    for _ in ("combine", "dispatch backward"):
                        send(i, j, row_bytes * rows(j, i, experts))
                    if kind != "all_gather":
                        for _ in ("dispatch", "combine backward"):
                            send(i, j, row_bytes * rows(i, j, experts))
                if kind == "all_gather":
                    for _ in ("dispatch", "combine backward"):
                        send(i, j, row_bytes * len(ids[i]))
                        send(i, j, 4 * rows(i, j))
        return sent

    def near(place):
        return [p for p in everyone if hosts[p] == hosts[place]]

    def speaks_for(place):
        return [
            s for s in everyone if s not in near(place) and partner(hosts, s, hosts[place]) == place
        ]

    for i in everyone:
        for host in set(hosts) - {hosts[i]}:
            to = partner(hosts, i, host)
            send(i, to, 8 * (len(near(to)) * num_local + (kind == "deduplicated")))
            # Many rows go in two messages: the partner's own, and those that it passes on.
            of_partner, of_others = rows(i, to), sum(rows(i, p) for p in near(to) if p != to)
            num_rows = of_partner + of_others
            tokens = sum(
                any(hosts[expert // num_local] == host for expert in chosen) for chosen in ids[i]
            )
            for _ in ("dispatch", "combine backward"):
                if kind == "deduplicated":
                    send(i, to, row_bytes * tokens + 4 * num_rows)
                else:
                    for part in (of_partner, of_others) if many else (num_rows,):
                        send(i, to, row_bytes * part)
        for source in speaks_for(i):
            own, via = rows(source, i), sum(rows(source, p) for p in near(i) if p != i)
            for part in (own, via) if many else (own + via,):
                for _ in ("combine", "dispatch backward"):
                    send(i, source, row_bytes * part)
        for j in near(i):
            send(i, j, 8 * num_local * (1 + len(speaks_for(i))))
            for own, via in (
                (rows(i, j), sum(rows(s, j) for s in speaks_for(i))),
                (rows(j, i), sum(rows(s, i) for s in speaks_for(j))),
            ):
                for part in (own, via) if many else (own + via,):
                    for _ in ("forward", "backward"):
                        send(i, j, row_bytes * part)
    return sent


@pytest.mark.ranks
@pytest.mark.parametrize("many", [False, True], ids=["few rows", "many rows"])
@pytest.mark.parametrize("hosts", ["aaaa", "aabb", "abab", "abcd", "abbb", "aab", "aabc"])
def test_messages_and_bytes_are_those_of_the_definition(rank_pool, hosts, many):
    world_size, num_experts = len(hosts), 2 * len(hosts)
    generator = torch.Generator().manual_seed(7)
    ids = [
        [torch.randperm(num_experts, generator=generator)[:2].tolist() for _ in range(count)]
        for count in (9, 0, 4, 11)[:world_size]
    ]
    found = rank_pool.run(
        world_size,
        (SCENARIOS, "count_traffic"),
        expert_parallel=world_size,
        hosts=hosts,
        ids=ids,
        num_experts=num_experts,
        many=many,
    )
    for kind in EXCHANGES:
        wanted = expected_traffic(kind, hosts, ids, num_experts, many=many)
        assert [of_rank[kind] for of_rank in found] == wanted, kind


@pytest.mark.ranks
@pytest.mark.parametrize("hosts", ["aaaa", "aabb", "abcd"])
def test_messages_between_hosts_are_fewer_by_the_ranks_of_a_host(rank_pool, hosts):
    """m hosts of p ranks, the same rows S for each pair of ranks; four movements and the counts."""
    m, p, rows = len(set(hosts)), 4 // len(set(hosts)), 2
    ids = [[[expert] for expert in range(4) for _ in range(rows)] for _ in range(4)]
    found = rank_pool.run(
        4, (SCENARIOS, "count_traffic"), expert_parallel=4, hosts=hosts, ids=ids, num_experts=4
    )
    pair_bytes = rows * 4 * 4
    for of_rank in found:
        flat, over_hosts = of_rank["all_to_all"], of_rank["hierarchical"]
        assert flat["inter_host"] == [5 * (m - 1) * p, (m - 1) * p * (4 * pair_bytes + 8)]
        assert over_hosts["inter_host"] == [5 * (m - 1), (m - 1) * p * (4 * pair_bytes + 8)]
        assert flat["intra_host"] == [5 * (p - 1), (p - 1) * (4 * pair_bytes + 8)]
        assert over_hosts["intra_host"] == [5 * (p - 1), (p - 1) * m * (4 * pair_bytes + 8)]


@pytest.mark.ranks
def test_a_token_crosses_to_a_host_once_on_the_way_out(rank_pool):
    # Every token goes to all four experts, two of them on the other host.
    ids = [[[0, 1, 2, 3]] * 5] * 4
    found = rank_pool.run(
        4, (SCENARIOS, "count_traffic"), expert_parallel=4, hosts="aabb", ids=ids, num_experts=4
    )
    row, counts = 4 * 4, 2 * 8
    for of_rank in found:
        # Out: rows twice, or tokens once and 4 bytes for each row; home: rows, in both.
        assert of_rank["hierarchical"]["inter_host"][1] == 4 * 10 * row + counts
        once = 2 * (5 * row + 10 * 4) + 2 * 10 * row + counts + 8
        assert of_rank["deduplicated"]["inter_host"][1] == once


# ---- gradients, memory, faults


@pytest.mark.ranks
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    ("tokens", "hosts"), [([3], "a"), ([1, 0, 2], "aab")], ids=["1 rank", "3 ranks"]
)
def test_gradients_are_right_by_gradcheck_in_fp64(rank_pool, exchange, tokens, hosts):
    rank_pool.run(
        len(tokens),
        (SCENARIOS, "slices_are_right"),
        expert_parallel=len(tokens),
        hosts=hosts,
        tokens=tokens,
        num_experts=2 * len(tokens),
        top_k=2,
        exchange=exchange,
    )


@pytest.mark.ranks
@pytest.mark.parametrize("hosts", ["aabb", "abbb"])
def test_no_buffer_is_larger_than_the_rows_it_is_for(rank_pool, hosts):
    generator = torch.Generator().manual_seed(3)
    ids = [
        [torch.randperm(8, generator=generator)[:2].tolist() for _ in range(count)]
        for count in (40, 0, 60, 20)
    ]
    rank_pool.run(
        4,
        (SCENARIOS, "use_no_more_memory_than_needed"),
        expert_parallel=4,
        hosts=hosts,
        ids=ids,
        num_experts=8,
    )


OPERATIONS = {
    "all_to_all": [
        "exchange_counts", "dispatch", "combine", "combine backward", "dispatch backward",
    ],
    "chunked": ["dispatch", "combine", "combine backward", "dispatch backward"],
    "all_gather": ["dispatch (numbers)", "dispatch", "combine backward (weights)"],
    "hierarchical": [
        f"{movement} {where} hosts"
        for movement in (
            "dispatch counts", "dispatch", "combine", "combine backward", "dispatch backward",
        )
        for where in ("between", "inside")
    ],
    "deduplicated": ["dispatch between hosts", "combine backward between hosts"],
}  # fmt: skip
EVERY_DAY = ("all_to_all", "hierarchical")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("exchange", "op"),
    [
        pytest.param(kind, op, marks=() if kind in EVERY_DAY else pytest.mark.nightly)
        for kind, ops in OPERATIONS.items()
        for op in ops
    ],
)
def test_a_peer_killed_in_any_phase_surfaces_on_every_rank(rank_pool, exchange, op):
    found = rank_pool.run(
        4,
        (SCENARIOS, "lose_a_peer_in"),
        expert_parallel=4,
        hosts="aabb",
        may_die=(3,),
        exchange=exchange,
        op=op,
        victim=3,
    )
    assert found[3] is None, "the victim is alive"
    for rank in found[:3]:
        # A rank for which the victim had nothing more in its turn notices in the next.
        assert rank["turn"] in (2, 3)
        assert rank["error"] in ("PeerLostError", "CommAbortedError")
        assert rank["group"].startswith("ep@")
        # Without one rank that aborts, a rank that has no connection to the victim would wait for
        # its time-out of 30 s, or for the others to leave after 0.5 s.
        assert rank["elapsed_s"] < 0.4


# ---- what is to come


@pytest.mark.ranks
@few_cases
@given(data=st.data())
def test_row_blocks_by_source_and_column_splits_fit_the_interface(rank_pool, data):
    world_size = data.draw(st.integers(1, 4))
    num_experts = world_size * data.draw(st.integers(1, 2))
    num_splits = data.draw(st.integers(1, 3))
    ids = draw_ids(data, world_size, num_experts)
    ids[0] = ids[0] or [[0]]
    found = rank_pool.run(
        world_size,
        (SCENARIOS, "run_toy"),
        expert_parallel=world_size,
        ids=[[chosen[: len(ids[0][0])] for chosen in of_rank] for of_rank in ids],
        num_experts=num_experts,
        num_column_splits=num_splits,
    )
    for rank in found:
        assert rank["wrong"] == []
        assert rank["largest"] < 2**53, "sums were not exact, and their order mattered"
        # First all blocks, then the columns of all blocks, split by split.
        starts = [6 * split // num_splits for split in range(num_splits)]
        assert rank["log"] == [
            *(f"block {source}" for source in range(world_size)),
            *(f"columns {start} of {source}" for start in starts for source in range(world_size)),
        ]
