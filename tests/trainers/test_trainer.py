"""The trainer on one rank: resuming, stopping, refusing; several ranks in test_trainer_ranks.py."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.comm.mesh import Mesh
from gangline.trainers import trainer as trainer_module
from gangline.trainers.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointEvent,
    CheckpointInfo,
    list_checkpoints,
    newest,
)
from gangline.trainers.config import TrainConfig
from gangline.trainers.data import TokenDataset
from gangline.trainers.generate import generate, load_model
from gangline.trainers.ledger import read_ledger
from gangline.trainers.losses import token_loss
from gangline.trainers.results import EvalResult, StepResult
from gangline.trainers.tokenizer import load_tokenizer
from gangline.trainers.trainer import Trainer, TrainingDivergedError


def job(moe=True, *, every_steps=4, precision="fp32", **training) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {
                "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24,
                "moe": {"num_experts": 4} if moe else None,
            },
            "data": {"seq_len": 16, "validation_fraction": 0.02},
            "optimizer": {"warmup_steps": 2, "lr": 0.01},
            "checkpoint": {"every_steps": every_steps, "asynchronous": False},
            "training": {"steps": 10, "batch_size": 4, "precision": precision, **training},
        }
    )  # fmt: skip


def found(root: Path) -> CheckpointInfo:
    info = newest(root)
    assert info is not None, "nothing was committed"
    return info


@pytest.fixture
def train(info, tmp_path):
    def run(config, root="run", *, stop_at=None, trainer=None, **options):
        data = TokenDataset(
            info,
            seq_len=config.data.seq_len,
            seed=config.training.seed,
            validation_fraction=config.data.validation_fraction,
        )
        trainer = trainer or Trainer(config, vocab_size=info.vocab_size)
        steps: list[StepResult] = []
        evals: list[EvalResult] = []
        events: list[CheckpointEvent] = []
        end = trainer.run(
            Mesh.single(),
            data,
            checkpoint_root=tmp_path / root,
            on_step=steps.append,
            on_eval=evals.append,
            on_checkpoint=events.append,
            should_stop=lambda: stop_at is not None and trainer.step + 1 == stop_at,
            **options,
        )
        return steps, evals, events, end

    return run


@pytest.fixture(scope="module")
def uninterrupted(info, tmp_path_factory):
    found = {}
    for precision in ("fp32", "bf16"):
        config = job(precision=precision)
        data = TokenDataset(info, seq_len=16, seed=0, validation_fraction=0.02)
        steps: list[StepResult] = []
        end = Trainer(config, vocab_size=info.vocab_size).run(
            Mesh.single(),
            data,
            checkpoint_root=tmp_path_factory.mktemp("whole"),
            on_step=steps.append,
        )
        losses = [step.loss for step in steps]
        found[precision] = (losses, end.weights_sha256)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", range(1, 10))
def test_resuming_at_any_step_costs_no_bit(train, uninterrupted, cut, precision):
    losses, sha256 = uninterrupted[precision]
    config = job(precision=precision)
    first, _, _, end = train(config, stop_at=cut)
    assert (end.stopped, end.step) == (True, cut)
    second, _, _, end = train(config)
    assert (end.stopped, end.step) == (False, 10)
    assert [step.loss for step in first + second] == losses
    assert end.weights_sha256 == sha256


def test_a_trainer_may_run_again_and_starts_from_what_is_committed(train, uninterrupted, info):
    trainer = Trainer(job(), vocab_size=info.vocab_size)
    train(job(), "one", stop_at=7, trainer=trainer)
    losses, sha256 = uninterrupted["fp32"]
    steps, _, _, end = train(job(), "two", trainer=trainer)  # another run: from the seed
    assert [step.loss for step in steps] == losses
    assert end.weights_sha256 == sha256


def test_what_a_run_reports(train, tmp_path):
    config = job(eval_every_steps=4)
    steps, evals, events, end = train(config)
    assert [step.step for step in steps] == list(range(1, 11))
    assert [result.step for result in evals] == [4, 8, 10]
    assert [event.step for event in events] == [4, 8, 10]
    assert evals[-1].loss < evals[0].loss
    assert abs(steps[0].loss - math.log(257)) < 0.1
    for step in steps:
        assert step.committed
        assert step.num_tokens == 4 * 16
        assert set(step.parts_s) == {
            "data", "forward_backward", "reduce", "optimizer", "checkpoint_stall"
        }  # fmt: skip
        assert sum(step.parts_s.values()) == pytest.approx(step.step_s)
        assert 1 <= step.expert_load_max_over_mean <= 4
        assert 0 < step.expert_entropy <= math.log(4) + 1e-9
        assert step.load_balance_loss >= 0.9
        assert step.z_loss >= 0
    # The final step is always a checkpoint, and running on from it takes no step.
    assert list_checkpoints(tmp_path / "run")[0].step == 10
    again, evals, _, second = train(config)
    assert (again, second) == ([], end)
    assert len(evals) == 1


def test_a_dense_model_trains_and_reports_no_experts(train):
    steps, _, _, _ = train(job(moe=False))
    assert steps[-1].loss < steps[0].loss - 0.2
    last = steps[-1]
    assert last.expert_load_max_over_mean is last.expert_entropy is None
    assert last.load_balance_loss is last.z_loss is None


def test_the_digest_is_that_of_the_saved_weights(train, tmp_path, info):
    _, _, _, end = train(job())
    model = load_model(job(), found(tmp_path / "run"), vocab_size=info.vocab_size)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == end.weights_sha256


def test_accumulation_gives_the_same_steps(train):
    # Without the balance loss, which is a microbatch's own.
    def without_balance(accumulation_steps):
        config = job(accumulation_steps=accumulation_steps).model_dump()
        config["model"]["moe"]["load_balance_coef"] = 0.0
        return TrainConfig.model_validate(config)

    once, _, _, _ = train(without_balance(1), "once")
    thrice, _, _, _ = train(without_balance(3), "thrice")
    for a, b in zip(once, thrice, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=2e-4)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=2e-2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch, info, tmp_path, where):
    trainer = Trainer(job(), vocab_size=info.vocab_size)
    before = []

    def poisoned(logits, targets):
        loss = token_loss(logits, targets)
        if trainer.step != 4:
            return loss
        before.append((trainer.flat.weights.clone(), trainer.optimizer.squares.clone()))
        if where == "loss":
            return loss * math.inf
        # A finite loss with a gradient that is not: the derivative of a root at 0.
        return loss + (logits.sum() * 0).sqrt()

    monkeypatch.setattr(trainer_module, "token_loss", poisoned)
    after = []
    steps: list[StepResult] = []

    def on_step(step):
        steps.append(step)
        if step.step == 5:
            after.append((trainer.flat.weights.clone(), trainer.optimizer.squares.clone()))

    data = TokenDataset(info, seq_len=16, seed=0, validation_fraction=0.02)
    trainer.run(Mesh.single(), data, checkpoint_root=tmp_path, on_step=on_step)
    assert [step.committed for step in steps] == [True] * 4 + [False] + [True] * 5
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert trainer.optimizer.num_updates == 9
    assert trainer.cursor == 40, "the samples of the skipped step are spent"


def test_too_many_skipped_steps_end_the_run(train, monkeypatch):
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED_STEPS", 3)
    monkeypatch.setattr(
        trainer_module, "token_loss", lambda logits, targets: token_loss(logits, targets) * math.nan
    )
    with pytest.raises(TrainingDivergedError, match=r"3 steps in a row.*optimizer\.lr"):
        train(job())


def test_other_data_or_seed_are_refused(train, info):
    train(job(), stop_at=3)
    with pytest.raises(ValueError, match="trained with seed 0, this run has 1"):
        train(job(seed=1))


def test_another_model_is_refused(train, info):
    train(job(), stop_at=3)
    with pytest.raises(CheckpointError, match="model"):
        train(job(moe=False))


def test_the_last_checkpoint_must_be_committed(train, monkeypatch):
    failed = []

    def fail(self, step, state, extra):
        failed.append(step)
        self._fail(step, "no room", {})

    monkeypatch.setattr(Checkpointer, "save", fail)
    with pytest.raises(CheckpointError, match="step 10, was not committed: no room"):
        train(job())
    assert failed == [4, 8, 10], "a failed save in between does not end the run"


def test_a_mesh_that_does_not_fit_is_refused(info, tmp_path):
    config = job(batch_size=1, accumulation_steps=1)
    data = TokenDataset(info, seq_len=16, seed=0, validation_fraction=0.02)
    trainer = Trainer(config, vocab_size=info.vocab_size)
    mesh = Mesh.single()
    mesh.world_size = 2
    with pytest.raises(ValueError, match=r"training\.batch_size 1"):
        trainer.run(mesh, data, checkpoint_root=tmp_path)
    mesh = Mesh.single()
    mesh.device = torch.device("cuda")
    with pytest.raises(ValueError, match="mesh is on cuda"):
        trainer.run(mesh, data, checkpoint_root=tmp_path)


def test_each_position_of_the_stream_is_taken_once(train, tmp_path, info):
    ledger = tmp_path / "ledger.jsonl"
    train(job(), stop_at=6, ledger=ledger)
    ledger.write_text(ledger.read_text() + '{"generation": 0, "st')  # a torn line
    taken = read_ledger(ledger)
    data = TokenDataset(info, seq_len=16, seed=0, validation_fraction=0.02)
    assert taken == {step: data.sample_ids(4 * (step - 1), 4).tolist() for step in range(1, 7)}


def test_of_a_step_taken_twice_the_newest_generation_counts(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    lines = [
        {"generation": 1, "step": 5, "rank": 0, "sample_ids": [1]},
        {"generation": 1, "step": 5, "rank": 1, "sample_ids": [2]},
        {"generation": 2, "step": 5, "rank": 0, "sample_ids": [1, 2]},
        {"generation": 1, "step": 4, "rank": 1, "sample_ids": [8]},
        {"generation": 1, "step": 4, "rank": 0, "sample_ids": [9]},
    ]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_ledger(ledger) == {4: [9, 8], 5: [1, 2]}


@pytest.fixture(scope="module")
def trained(info, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    data = TokenDataset(info, seq_len=16, seed=0, validation_fraction=0.02)
    Trainer(job(), vocab_size=info.vocab_size).run(Mesh.single(), data, checkpoint_root=root)
    return load_model(job(), found(root), vocab_size=info.vocab_size)


def test_text_is_a_function_of_the_arguments(trained):
    tokenizer = load_tokenizer("bytes")
    pieces: list[str] = []
    one = generate(trained, tokenizer, "line 7", num_tokens=60, on_text=pieces.append)
    assert one == generate(trained, tokenizer, "line 7", num_tokens=60)
    assert one == "".join(pieces)
    assert one != generate(trained, tokenizer, "line 7", num_tokens=60, seed=1)
    assert generate(trained, tokenizer, "", num_tokens=0) == ""
    cold = generate(trained, tokenizer, "line", num_tokens=8, temperature=0)
    assert cold == generate(trained, tokenizer, "line", num_tokens=8, temperature=5.0, top_k=1)


@settings(max_examples=15, deadline=None)
@given(prompt_len=st.integers(1, 50), num_tokens=st.integers(1, 40))
def test_each_token_follows_from_the_window_before_it(trained, prompt_len, num_tokens):
    # Greedy, so that each choice can be checked against a forward without a cache.
    tokenizer = load_tokenizer("bytes")
    prompt = ("line 12 says 47 and no more\n" * 2)[:prompt_len]
    written = generate(trained, tokenizer, prompt, num_tokens=num_tokens, temperature=0)
    tokens, size = list(prompt.encode()), 16
    start = 0
    for char in written.encode():
        if len(tokens) - start > size:
            start = len(tokens) - size // 2
        logits, _ = trained(torch.tensor([tokens[start:]]))
        best = logits[0, -1].topk(2)
        if (best.values[0] - best.values[1]).item() < 1e-4:
            return  # a tie, which another order of sums may decide otherwise
        assert char == int(best.indices[0])
        tokens.append(char)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"num_tokens": -1}])
def test_senseless_arguments_are_refused(trained, wrong):
    with pytest.raises(ValueError, match="top_k"):
        generate(trained, load_tokenizer("bytes"), "a", **{"num_tokens": 1, **wrong})
