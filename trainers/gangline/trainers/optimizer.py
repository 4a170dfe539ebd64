"""AdamW over the flat buffers, with warm-up and cosine, and clipping by the global norm.

Source: decoupled weight decay, Loshchilov and Hutter, arXiv 1711.05101; the cosine without
restarts, arXiv 1608.03983, eq. 5.

torch's fused AdamW on one flat tensor takes 1.2 ms for 2.7 million parameters on one core; the
foreach form 4.1 ms, and 4.9 over a list of tensors.
"""

import math

import torch
from torch import Tensor, nn

from gangline.trainers.config import OptimizerConfig
from gangline.trainers.data_parallel import FlatParameters
from gangline.trainers.sharded_parameters import ShardedParameters


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """Return the rate of step `step` (from 0): linear up to lr, then half a cosine down.

    The last step has lr * min_lr_ratio; a run no longer than its warm-up stays in it.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    lowest = config.lr * config.min_lr_ratio
    num_cosine_steps = max(num_steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / num_cosine_steps, 1.0)
    return lowest + (config.lr - lowest) * (1 + math.cos(math.pi * progress)) / 2


class Optimizer:
    """Apply gradients to weights; its state lies in flat buffers of the same layout."""

    def __init__(self, flat: FlatParameters | ShardedParameters, config: OptimizerConfig) -> None:
        self.config = config
        self.flat = flat
        self.averages = torch.zeros_like(flat.weights)
        self.squares = torch.zeros_like(flat.weights)
        self._counts: list[Tensor] = []
        runs: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for region in flat.layout.regions:
            run = nn.Parameter(flat.weights[region.start : region.end])
            run.grad = flat.grads[region.start : region.end]
            runs[region.decays].append(run)
        self._adamw = torch.optim.AdamW(
            [
                {"params": runs[True], "weight_decay": config.weight_decay},
                {"params": runs[False], "weight_decay": 0.0},
            ],
            lr=config.lr, betas=config.betas, eps=config.eps, fused=True,
        )  # fmt: skip
        # The state is put in place here instead of at the first step, so that checkpoints load
        # into it and a spare has paid for its memory before it is needed.
        for weights in (*runs[True], *runs[False]):
            start = weights.storage_offset()
            count = torch.zeros((), dtype=torch.float32, device=weights.device)
            self._counts.append(count)
            self._adamw.state[weights] = {
                "step": count,
                "exp_avg": self.averages[start : start + weights.numel()],
                "exp_avg_sq": self.squares[start : start + weights.numel()],
            }

    @property
    def num_updates(self) -> int:
        """Return how many updates were applied; skipped steps do not count."""
        return int(self._counts[0].item())

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        for count in self._counts:
            count.fill_(value)

    def reset(self) -> None:
        """Forget all state, as before the first update."""
        self.averages.zero_()
        self.squares.zero_()
        self.num_updates = 0

    def update(self, *, lr: float, grad_norm: float) -> None:
        """Clip the gradients to the configured norm and apply them."""
        if grad_norm > self.config.grad_clip_norm:
            self.flat.grads.mul_(self.config.grad_clip_norm / grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
