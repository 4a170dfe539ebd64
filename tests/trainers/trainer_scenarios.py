"""What each rank does in the tests of the trainer; run by rank_server.py."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gangline.comm import collectives
from gangline.comm.errors import CommError
from gangline.comm.mesh import Mesh
from gangline.trainers import trainer as trainer_module
from gangline.trainers.config import TrainConfig
from gangline.trainers.data import DatasetInfo, TokenDataset
from gangline.trainers.losses import router_losses, token_loss
from gangline.trainers.moe import Routing
from gangline.trainers.results import StepResult
from gangline.trainers.trainer import Trainer


def router_losses_are_global(mesh: Mesh, tokens: list[int], num_experts: int) -> None:
    """Compare losses and gradients of divided tokens with those of one process."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(sum(tokens), num_experts, dtype=torch.float64, generator=generator)
    start = sum(tokens[: mesh.rank])

    def losses(scores: Tensor, where: Mesh) -> Any:
        lse = scores.logsumexp(-1)
        choices = torch.bincount(scores.topk(2).indices.flatten(), minlength=num_experts)
        routing = Routing(choices, (scores - lse[:, None]).exp().sum(0), lse.square().sum())
        return router_losses([routing, routing], where)

    whole = logits.clone().requires_grad_()
    truth = losses(whole, Mesh.single())
    (truth.load_balance + truth.z).backward()
    part = logits[start : start + tokens[mesh.rank]].clone().requires_grad_()
    ours = losses(part, mesh)
    (ours.load_balance + ours.z).backward()
    sums = torch.stack([ours.load_balance.detach(), ours.z.detach()])
    collectives.all_reduce(sums, mesh, "world").wait()
    torch.testing.assert_close(sums[0], truth.load_balance.detach())
    torch.testing.assert_close(sums[1], truth.z.detach())
    assert whole.grad is not None
    assert part.grad is not None
    torch.testing.assert_close(part.grad, whole.grad[start : start + tokens[mesh.rank]])


def train(
    mesh: Mesh,
    config: dict[str, Any],
    dataset: dict[str, Any],
    root: str,
    *,
    kill: dict[str, int] | None = None,
    poison: dict[str, int] | None = None,
    stop: dict[str, int] | None = None,
    lose_mesh_at: int | None = None,
    store_port: int = 0,
    ledger: str | None = None,
) -> dict[str, Any]:
    """Train; return the steps and the end. Faults are {"rank": r, "step": s}."""
    settings, info = TrainConfig.model_validate(config), DatasetInfo.from_json(dataset)
    data = TokenDataset(
        info,
        seq_len=settings.data.seq_len,
        seed=settings.training.seed,
        validation_fraction=settings.data.validation_fraction,
    )
    trainer = Trainer(settings, vocab_size=info.vocab_size)
    steps: list[StepResult] = []
    evals: list[float] = []

    def is_here(fault: dict[str, int] | None, step: int) -> bool:
        return fault is not None and fault["rank"] == mesh.rank and fault["step"] == step

    def on_step(result: StepResult) -> None:
        steps.append(result)
        if is_here(kill, result.step):
            os.kill(os.getpid(), signal.SIGKILL)
        if result.step == lose_mesh_at and mesh.rank == 0:
            mesh.abort()

    def poisoned_loss(logits: Tensor, targets: Tensor) -> Tensor:
        loss = token_loss(logits, targets)
        return loss * math.nan if is_here(poison, trainer.step + 1) else loss

    setattr(trainer_module, "token_loss", poisoned_loss)  # noqa: B010 - it is not exported

    def run(where: Mesh) -> Any:
        return trainer.run(
            where,
            data,
            checkpoint_root=Path(root),
            on_step=on_step,
            on_eval=lambda result: evals.append(result.loss),
            should_stop=lambda: is_here(stop, trainer.step + 1),
            ledger=Path(ledger) if ledger else None,
        )

    try:
        end = run(mesh)
    except CommError as error:
        if lose_mesh_at is None:
            return {"error": type(error).__name__, "step": trainer.step}
        mesh.leave()
        lose_mesh_at = None
        again = Mesh.join(
            rank=mesh.rank,
            world_size=mesh.world_size,
            store_host="127.0.0.1",
            store_port=store_port,
            generation=mesh.generation + 1_000_000,
            expert_parallel=settings.mesh.expert_parallel,
            timeout_s=20.0,
        )
        end = run(again)
        again.leave()
    return {
        "losses": [step.loss for step in steps],
        "committed": [step.committed for step in steps],
        "numbers": [step.step for step in steps],
        "grad_norms": [step.grad_norm for step in steps],
        "evals": evals,
        "stopped": end.stopped,
        "step": end.step,
        "sha256": end.weights_sha256,
    }
