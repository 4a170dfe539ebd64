"""Settings of a training run: what is accepted, what is refused, and what the refusal says."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gangline.trainers.config import TrainConfig, check_layout, config_digest


def config(**sections):
    return TrainConfig.model_validate(sections)


def test_the_defaults_are_valid_and_survive_json():
    original = config(model={"moe": {}}, optimizer={"betas": [0.8, 0.9]})
    assert TrainConfig.model_validate_json(original.model_dump_json()) == original
    assert TrainConfig.model_validate(original.model_dump(mode="json")) == original
    assert config_digest(original) == config_digest(original.model_copy())
    assert config_digest(original) != config_digest(config())


def test_every_kind_of_token_exchange_can_be_set_and_survives_a_dump():
    for exchange in (
        {"kind": "all_gather"},
        {"kind": "hierarchical", "deduplicate": True},
        {"kind": "chunked", "chunks": 4},
        {"kind": "chunked"},
        {"kind": "local"},
        {},
    ):
        degree = 1 if exchange.get("kind") == "local" else 2
        original = config(
            model={"moe": {}}, mesh={"expert_parallel": degree, "token_exchange": exchange}
        )
        assert TrainConfig.model_validate(original.model_dump(mode="json")) == original


def test_it_loads_no_torch():
    code = (
        "import sys, gangline.trainers.config, gangline.trainers.sizing, gangline.trainers.results;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"dim": 130}}, ["model.dim 130", "model.num_heads 4", "set model.dim to 128"]),
        ({"model": {"dim": 4}}, ["even head width", "set model.dim to 8"]),
        ({"model": {"num_kv_heads": 3}}, ["model.num_kv_heads 3", "[1, 2, 4]"]),
        ({"model": {"moe": {"top_k": 9}}}, ["model.moe.top_k is 9", "at most 8"]),
        ({"model": {"moe": {"every": 5}}}, ["model.moe.every is 5", "at most 4"]),
        ({"mesh": {"expert_parallel": 2}}, ["mesh.expert_parallel is 2", "add model.moe"]),
        (
            {"mesh": {"expert_parallel": 3}, "model": {"moe": {}}},
            ["model.moe.num_experts 8", "[1, 2, 4, 8]"],
        ),
        (
            {"mesh": {"token_exchange": {"kind": "all_to_all", "chunks": 2}}},
            ["mesh.token_exchange.chunks is 2", "set mesh.token_exchange.kind to chunked"],
        ),
        (
            {"mesh": {"token_exchange": {"deduplicate": True}}},
            ["mesh.token_exchange.deduplicate is true", "auto exchange", "hierarchical"],
        ),
        (
            {
                "mesh": {"expert_parallel": 2, "token_exchange": {"kind": "local"}},
                "model": {"moe": {}},
            },
            ["mesh.token_exchange.kind is local", "mesh.expert_parallel 2", "to auto"],
        ),
        (
            {
                "mesh": {"expert_parallel": 8, "token_exchange": {"kind": "chunked"}},
                "model": {"moe": {}},
            },
            ["gives each worker one", "to all_to_all"],
        ),
        (
            {
                "mesh": {"expert_parallel": 4, "token_exchange": {"kind": "chunked", "chunks": 3}},
                "model": {"moe": {}},
            },
            ["mesh.token_exchange.chunks 3", "2 experts of a worker", "at most 2"],
        ),
        (
            {"training": {"batch_size": 2, "accumulation_steps": 3}},
            ["training.accumulation_steps 3", "at most 2"],
        ),
        (
            {"training": {"eval_every_steps": 5}, "data": {"validation_fraction": 0}},
            ["training.eval_every_steps is 5", "data.validation_fraction"],
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_with_field_and_mend(sections, words):
    with pytest.raises(ValidationError) as caught:
        config(**sections)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"dim": "128"}},
        {"model": {"dim": True}},
        {"model": {"dim": 128.5}},
        {"model": {"dims": 128}},
        {"optimizer": {"lr": 0}},
        {"optimizer": {"lr": float("nan")}},
        {"optimizer": {"betas": [0.9]}},
        {"optimizer": {"betas": ["0.9", 0.95]}},
        {"optimizer": {"betas": [0.9, 1.0]}},
        {"data": {"source": []}},
        {"data": {"source": ""}},
        {"training": {"precision": "fp16"}},
        {"checkpoint": {"keep": 1}},
    ],
)
def test_a_wrong_value_is_refused(sections):
    with pytest.raises(ValidationError):
        config(**sections)


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        config().training.steps = 5


@pytest.mark.parametrize(
    ("num_workers", "word"),
    [(0, "number of workers"), (3, "mesh.expert_parallel"), (8, "training.batch_size")],
)
def test_a_number_of_workers_that_does_not_fit_is_refused(num_workers, word):
    settings = config(model={"moe": {}}, mesh={"expert_parallel": 2}, training={"batch_size": 4})
    check_layout(settings, 4)
    with pytest.raises(ValueError, match=word):
        check_layout(settings, num_workers)


@given(dim=st.integers(2, 300), num_kv_heads=st.integers(1, 8), group=st.integers(1, 4))
def test_a_mended_dim_is_accepted(dim, num_kv_heads, group):
    model = {"num_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads}
    try:
        accepted = config(model={**model, "dim": dim}).model
    except ValidationError as error:
        mended = int(str(error).split("set model.dim to ")[1].split()[0])
        accepted = config(model={**model, "dim": mended}).model
    assert accepted.head_dim * accepted.num_heads == accepted.dim
    assert accepted.head_dim % 2 == 0
