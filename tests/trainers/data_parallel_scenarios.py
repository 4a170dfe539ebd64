"""What each rank does in the tests of buckets and slices; run by rank_server.py."""

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from gangline.comm.errors import CommError
from gangline.comm.fusion_slices import FusedSlices
from gangline.comm.handle import Call
from gangline.comm.mesh import Mesh
from gangline.trainers.config import TrainConfig
from gangline.trainers.data import DatasetInfo, TokenDataset
from gangline.trainers.sharded_parameters import ShardedParameters
from gangline.trainers.trainer import Trainer


def _prepare(config: dict[str, Any], dataset: dict[str, Any]) -> tuple[Trainer, TokenDataset]:
    settings, info = TrainConfig.model_validate(config), DatasetInfo.from_json(dataset)
    data = TokenDataset(info, seq_len=settings.data.seq_len, seed=0, validation_fraction=0.02)
    return Trainer(settings, vocab_size=info.vocab_size), data


def count_collectives(
    mesh: Mesh, config: dict[str, Any], dataset: dict[str, Any], root: str
) -> list[dict[str, int]]:
    """Train; return per step how many operations of each kind went over each axis.

    What is left after the last step (evaluation, digest, checkpoint) is not counted.
    """
    trainer, data = _prepare(config, dataset)
    counts: Counter[str] = Counter()
    steps: list[dict[str, int]] = []
    start = Call.__init__

    def counting_start(call: Call, op: str, axis: Any, *args: Any) -> None:
        if axis.group is not None:
            counts[f"{op} {axis.name}"] += 1
        start(call, op, axis, *args)

    def on_step(_: Any) -> None:
        steps.append(dict(counts))
        counts.clear()

    setattr(Call, "__init__", counting_start)  # noqa: B010 - one for each operation
    trainer.run(mesh, data, checkpoint_root=Path(root), on_step=on_step)
    return steps[1:-1]  # the first and the last step have the checkpoint's exchanges


def die_in_backward(
    mesh: Mesh,
    config: dict[str, Any],
    dataset: dict[str, Any],
    root: str,
    victim: int,
    step: int,
    weight: str,
) -> dict[str, Any]:
    """Train until one rank dies when it has the gradient of `weight` in a step."""
    trainer, data = _prepare(config, dataset)

    def die(_: torch.Tensor) -> None:
        if mesh.rank == victim and trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)

    dict(trainer.model.named_parameters())[weight].register_post_accumulate_grad_hook(die)
    last = [time.perf_counter()]
    try:
        trainer.run(
            mesh,
            data,
            checkpoint_root=Path(root),
            on_step=lambda _: last.append(time.perf_counter()),
        )
    except CommError as error:
        waited_s = time.perf_counter() - last[-1]
        return {"error": type(error).__name__, "step": trainer.step, "waited_s": waited_s}
    raise AssertionError("the run ended without the victim")


def slices_of(trainer: Trainer) -> FusedSlices:
    """Return what holds the slices of a trainer that has some."""
    assert isinstance(trainer.flat, ShardedParameters)
    return trainer.flat._slices


def measure_state(
    mesh: Mesh, config: dict[str, Any], dataset: dict[str, Any], root: str
) -> dict[str, Any]:
    """Train; return how many elements a rank holds, and how many layers were whole at once."""
    trainer, data = _prepare(config, dataset)
    num_whole: list[int] = []
    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: num_whole.append(slices_of(trainer).num_whole)
        )
    trainer.run(mesh, data, checkpoint_root=Path(root))
    return {
        "num_elements": trainer.flat.weights.numel(),
        "averages": trainer.optimizer.averages.numel(),
        "num_dense": trainer.flat.layout.num_dense,
        "most_whole": max(num_whole),
    }
