"""The trainer with compressed gradients: replicas agree, runs resume, the job says what fits."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from gangline.trainers.config import TrainConfig

SCENARIOS = Path(__file__).with_name("trainer_scenarios.py")
TOP = {"kind": "top_k", "fraction": 0.05}


def job(compression, *, degree=1, **training):
    return {
        "model": {
            "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24,
            "moe": {"num_experts": 4},
        },
        "data": {"seq_len": 16, "validation_fraction": 0.02},
        "optimizer": {"warmup_steps": 2, "lr": 0.01, "compression": compression},
        "mesh": {"expert_parallel": degree, "bucket_bytes": 4096},
        "checkpoint": {"every_steps": 3, "asynchronous": False},
        "training": {"steps": 8, "batch_size": 5, **training},
    }  # fmt: skip


@pytest.fixture
def dataset(info):
    return info.to_json()


@pytest.fixture
def train(rank_pool, dataset, tmp_path):
    def run(world_size, config, *, root="run", **options):
        return rank_pool.run(
            world_size,
            (SCENARIOS, "train"),
            expert_parallel=config["mesh"]["expert_parallel"],
            config=config,
            dataset=dataset,
            root=str(tmp_path / root),
            **options,
        )

    return run


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("settings", "world_size", "degree"),
    [(TOP, 3, 1), (TOP, 4, 2), ({"kind": "dithering"}, 2, 1)],
    ids=str,
)
def test_replicas_agree_and_learn(train, settings, world_size, degree):
    found = train(world_size, job(settings, degree=degree, steps=20))
    assert len({rank["sha256"] for rank in found}) == 1
    assert len({tuple(rank["losses"]) for rank in found}) == 1
    assert found[0]["losses"][-1] < found[0]["losses"][0] - 0.5, "nothing was learnt"
    plain = train(world_size, job(None, degree=degree, steps=20), root="plain")
    assert plain[0]["sha256"] != found[0]["sha256"], "nothing was compressed"


@pytest.mark.ranks
@pytest.mark.parametrize("settings", [TOP, {"kind": "natural"}], ids=str)
def test_a_resumed_run_is_bit_for_bit_the_whole_one(train, settings):
    whole = train(2, job(settings), root="whole")
    train(2, job(settings), root="cut", stop={"rank": 1, "step": 5})
    rest = train(2, job(settings), root="cut")
    assert rest[0]["numbers"] == [6, 7, 8]
    assert rest[0]["losses"] == whole[0]["losses"][5:]
    assert [rank["sha256"] for rank in rest] == [rank["sha256"] for rank in whole]


@pytest.mark.ranks
@pytest.mark.parametrize("new_size", [1, 2, 4])
def test_another_number_of_workers_goes_on(train, new_size):
    train(3, job(TOP), root="run", stop={"rank": 0, "step": 4})
    rest = train(new_size, job(TOP), root="run")
    assert rest[0]["numbers"] == [5, 6, 7, 8]
    assert len({rank["sha256"] for rank in rest}) == 1


@pytest.mark.ranks
def test_compression_may_begin_and_end_at_a_checkpoint(train):
    train(2, job(None), root="run", stop={"rank": 0, "step": 3})
    train(2, job(TOP), root="run", stop={"rank": 0, "step": 5})
    rest = train(2, job(None), root="run")
    assert rest[0]["numbers"] == [6, 7, 8]


@pytest.mark.ranks
def test_a_step_that_is_not_finite_on_one_rank_commits_on_none(train):
    found = train(2, job(TOP, steps=4), poison={"rank": 1, "step": 2})
    for rank in found:
        assert rank["committed"] == [True, False, True, True]
    assert found[0]["sha256"] == found[1]["sha256"]
    assert found[0]["evals"][0] < 8


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"mesh": {"shard_parameters": True}}, "leave optimizer.compression out"),
        ({"optimizer": {"error_feedback": True}}, "set optimizer.compression"),
        ({"optimizer": {"compression": {"kind": "top_k"}}}, "fraction is missing"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(part, words):
    wanted = {"optimizer": {"compression": TOP}, **part}
    with pytest.raises(ValidationError, match=words):
        TrainConfig.model_validate(wanted)


def test_feedback_is_on_where_the_compressor_needs_it():
    for kind, asked, wanted in (
        ("natural", None, False), ("scaled_sign", None, True), ("group_sign", None, True),
        ("natural", True, True), ("scaled_sign", False, False),
    ):  # fmt: skip
        optimizer = {"compression": {"kind": kind}, "error_feedback": asked}
        assert TrainConfig.model_validate({"optimizer": optimizer}).optimizer.feeds_back == wanted
    assert not TrainConfig().optimizer.feeds_back
