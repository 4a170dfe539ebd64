"""What the ranks tell each other at the end of a step, in one small all-reduce.

All entries are sums over ranks. The two votes ride along: a step commits when every rank has a
finite loss and gradient, and the run stops when any rank was asked to. As each rank gets the same
bits, each comes to the same decision without another exchange.

M = mixture layers, E = experts
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.comm.collectives import all_reduce
from gangline.comm.mesh import Mesh
from gangline.trainers.losses import RouterLosses


@dataclass(frozen=True)
class StepSums:
    """The sums over all ranks, on the host."""

    num_finite_ranks: int
    num_stop_votes: int
    token_loss: float
    load_balance: float
    z: float
    grad_norm: float
    choices: list[list[int]]  # per mixture layer and expert

    def load_max_over_mean(self) -> float | None:
        """Return the worst layer's largest expert load over its mean; None without choices."""
        loads = [max(layer) * len(layer) / sum(layer) for layer in self.choices if sum(layer)]
        return max(loads, default=None)

    def load_entropy(self) -> float | None:
        """Return the entropy of the experts' loads in nats, mean over layers."""
        entropies = [
            -sum(n / sum(layer) * math.log(n / sum(layer)) for n in layer if n)
            for layer in self.choices
            if sum(layer)
        ]
        return sum(entropies) / len(entropies) if entropies else None


class LocalSums:
    """Add up this rank's microbatches, on the device."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        # token loss, load balance, z
        self._losses = torch.zeros(3, dtype=torch.float64, device=mesh.device)
        self._choices_ME: Tensor | None = None

    def add(self, token_loss: Tensor, router: RouterLosses) -> None:
        """Add one microbatch."""
        losses = torch.stack([token_loss.detach(), router.load_balance.detach(), router.z.detach()])
        self._losses += losses
        choices = router.choices_ME
        self._choices_ME = choices if self._choices_ME is None else self._choices_ME + choices

    def reduce(self, squared_norms: tuple[Tensor, Tensor], *, wants_stop: bool) -> StepSums:
        """Return the sums over all ranks.

        `squared_norms` are those of the reduced gradients: of what is the same on all ranks, and
        of what this rank adds to that.

        Communicates: one all-reduce of a few numbers over "world"; waits for the device.
        """
        assert self._choices_ME is not None, "a step has at least one microbatch"
        shared, own = squared_norms
        is_finite = torch.isfinite(self._losses).all() & torch.isfinite(shared + own)
        votes = torch.stack([is_finite.double(), torch.full_like(own, float(wants_stop))])
        vector = torch.cat(
            [votes, self._losses, own.unsqueeze(0), self._choices_ME.flatten().double()]
        )
        all_reduce(vector, self._mesh, "world").wait()
        values = torch.cat([vector, shared.unsqueeze(0)]).tolist()
        num_layers, num_experts = self._choices_ME.shape
        flat = [int(value) for value in values[6:-1]]
        rows = [flat[layer * num_experts :][:num_experts] for layer in range(num_layers)]
        return StepSums(
            num_finite_ranks=int(values[0]),
            num_stop_votes=int(values[1]),
            token_loss=values[2],
            load_balance=values[3],
            z=values[4],
            grad_norm=math.sqrt(values[5] + values[-1]),
            choices=rows,
        )
