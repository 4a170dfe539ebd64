"""The trainer on several ranks: layouts, faults, votes."""

import json
from pathlib import Path

import pytest

from gangline.trainers.ledger import read_ledger

pytestmark = pytest.mark.ranks
SCENARIOS = Path(__file__).with_name("trainer_scenarios.py")


def job(*, degree=1, load_balance_coef=0.01, **training):
    return {
        "model": {
            "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24,
            "moe": {"num_experts": 4, "load_balance_coef": load_balance_coef},
        },
        "data": {"seq_len": 16, "validation_fraction": 0.02},
        "optimizer": {"warmup_steps": 2, "lr": 0.01},
        "mesh": {"expert_parallel": degree},
        "checkpoint": {"every_steps": 3, "asynchronous": False},
        "training": {"steps": 8, "batch_size": 5, **training},
    }  # fmt: skip


@pytest.fixture
def dataset(info):
    return info.to_json()


@pytest.fixture
def train(rank_pool, dataset, tmp_path):
    def run(world_size, config, *, root="run", may_die=(), **options):
        return rank_pool.run(
            world_size,
            (SCENARIOS, "train"),
            expert_parallel=config["mesh"]["expert_parallel"],
            may_die=may_die,
            config=config,
            dataset=dataset,
            root=str(tmp_path / root),
            **options,
        )

    return run


@pytest.mark.parametrize("tokens", [[5, 3], [0, 7, 1], [4, 4, 0, 2]])
def test_the_routers_losses_do_not_depend_on_who_has_the_tokens(rank_pool, tokens):
    rank_pool.run(
        len(tokens), (SCENARIOS, "router_losses_are_global"), tokens=tokens, num_experts=4
    )


@pytest.mark.parametrize(
    ("world_size", "degree", "accumulation"),
    [(2, 1, 1), (2, 2, 2), (3, 1, 1), (4, 2, 1), (4, 4, 1)],
)
def test_every_layout_trains_the_same_model(train, world_size, degree, accumulation):
    # 5 sequences are an uneven share on every layout. The balance of experts is that of a
    # microbatch, so with several of them it is another one by definition, and left out.
    coef = 0.01 if accumulation == 1 else 0.0
    (alone,) = train(1, job(load_balance_coef=coef), root="alone")
    config = job(degree=degree, accumulation_steps=accumulation, load_balance_coef=coef)
    found = train(world_size, config, root="divided")
    assert len({rank["sha256"] for rank in found}) == 1
    assert len({tuple(rank["losses"]) for rank in found}) == 1
    assert found[0]["losses"] == pytest.approx(alone["losses"], rel=2e-4)
    assert found[0]["evals"] == pytest.approx(alone["evals"], rel=2e-4)
    assert alone["losses"][-1] < alone["losses"][0] - 0.5, "nothing was learnt"
    # Of the first step, where the weights are the same: experts counted once, however divided.
    assert found[0]["grad_norms"][0] == pytest.approx(alone["grad_norms"][0], rel=1e-5)


@pytest.mark.parametrize("degree", [1, 2])
def test_a_killed_rank_costs_no_bit(train, degree):
    config = job(degree=degree)
    unharmed = train(2, config, root="unharmed")
    first = train(2, config, root="harmed", may_die=(1,), kill={"rank": 1, "step": 5})
    assert first[1] is None, "the victim is alive"
    assert first[0] == {"error": "PeerLostError", "step": first[0]["step"]}
    assert 5 <= first[0]["step"] <= 6
    second = train(2, config, root="harmed")
    assert second[0]["numbers"] == [4, 5, 6, 7, 8], "it did not go on from step 3"
    assert second[0]["losses"] == unharmed[0]["losses"][3:]
    assert second[0]["sha256"] == second[1]["sha256"] == unharmed[0]["sha256"]
    assert second[0]["evals"] == unharmed[0]["evals"]


def test_a_trainer_that_lost_its_mesh_runs_again_on_the_next_one(train, rank_pool):
    unharmed = train(2, job(), root="unharmed")
    harmed = train(2, job(), root="harmed", lose_mesh_at=5, store_port=rank_pool.store_port(2))
    for rank in harmed:
        assert rank["numbers"][-5:] == [4, 5, 6, 7, 8]
        assert len(rank["numbers"]) in (10, 11), "the mesh was lost after step 5 or 6"
        assert rank["sha256"] == unharmed[0]["sha256"]


@pytest.mark.parametrize("degree", [1, 2])
def test_a_step_that_is_not_finite_on_one_rank_commits_on_none(train, degree):
    config = job(degree=degree, steps=4)
    found = train(2, config, poison={"rank": 1, "step": 2})
    for rank in found:
        assert rank["committed"] == [True, False, True, True]
    assert found[0]["sha256"] == found[1]["sha256"]
    # The weights did not change, so they give the same held-out loss as without that batch ...
    plain = train(2, config, root="plain")
    assert plain[0]["committed"] == [True] * 4
    assert plain[0]["sha256"] != found[0]["sha256"]
    assert found[0]["evals"][0] < 8  # ... and are no NaN


def test_one_rank_stops_all_and_the_rest_follows_bit_for_bit(train):
    whole = train(2, job(), root="whole")
    first = train(2, job(), root="cut", stop={"rank": 1, "step": 5})
    assert [(rank["stopped"], rank["step"]) for rank in first] == [(True, 5), (True, 5)]
    second = train(2, job(), root="cut")
    assert second[0]["numbers"] == [6, 7, 8]
    assert first[0]["losses"] + second[0]["losses"] == whole[0]["losses"]
    assert second[0]["sha256"] == whole[0]["sha256"]


def test_another_number_of_workers_takes_the_same_samples(train, tmp_path):
    whole = tmp_path / "whole.jsonl"
    train(1, job(sample_ledger=True), root="whole", ledger=str(whole))
    parts = tmp_path / "parts.jsonl"
    for world_size, stop in ((2, 4), (4, 6), (3, 99)):
        train(
            world_size,
            job(steps=8),
            root="parts",
            ledger=str(parts),
            stop={"rank": 0, "step": stop},
        )
    assert read_ledger(parts) == read_ledger(whole)
    assert [json.loads(line)["step"] for line in whole.read_text().splitlines()] == list(
        range(1, 9)
    )
