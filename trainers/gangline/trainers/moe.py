"""Feed-forward layers: dense, and as a mixture of experts.

A token's output is the weighted sum of its top-k experts, each a SwiGLU of its own. No token is
dropped unless a capacity factor is set. The router works in fp32 whatever the precision.

T = tokens, D = model dim, F = hidden width, E = experts, L = local experts, K = top-k, R = rows
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gangline.comm.mesh import Mesh
from gangline.comm.token_exchange import combine, dispatch
from gangline.kernels.grouped_mm import grouped_mm
from gangline.kernels.permute import permute, plan_permutation, unpermute
from gangline.kernels.router import route
from gangline.kernels.swiglu import swiglu
from gangline.trainers.config import MoEConfig


@dataclass(frozen=True)
class Routing:
    """What one layer's router did with this rank's tokens; sums, so that they add over ranks."""

    choices_E: Tensor  # how often each expert was chosen (dropped choices included), int64
    prob_sum_E: Tensor  # sum over tokens of the full softmax, fp32, with gradient
    z_sum: Tensor  # sum over tokens of logsumexp(logits)^2, fp32, with gradient


class FeedForward(nn.Module):
    """Apply one SwiGLU to every token."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * ffn_dim, dim))
        self.down = nn.Parameter(torch.empty(dim, ffn_dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Shapes: [B, S, D] in and out."""
        hidden = swiglu(functional.linear(x_BSD, self.gate_up.to(x_BSD.dtype)))
        return functional.linear(hidden, self.down.to(x_BSD.dtype))


class Experts(nn.Module):
    """Hold the weights of this rank's experts, stacked."""

    def __init__(self, num_local_experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_local_experts, dim, 2 * ffn_dim))
        self.down = nn.Parameter(torch.empty(num_local_experts, ffn_dim, dim))

    def forward(self, rows_QD: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        """Shapes: rows_QD [Q, D] sorted by expert, rows_per_expert_L [L]; returns [Q, D]."""
        dtype = rows_QD.dtype
        hidden = swiglu(grouped_mm(rows_QD, self.gate_up.to(dtype), rows_per_expert_L))
        return grouped_mm(hidden, self.down.to(dtype), rows_per_expert_L)


class MixtureOfExperts(nn.Module):
    """Send each token to its top-k experts and sum what they return."""

    def __init__(self, config: MoEConfig, dim: int, ffn_dim: int, num_local_experts: int) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Parameter(torch.empty(config.num_experts, dim))
        self.experts = Experts(num_local_experts, dim, config.expert_ffn_dim or ffn_dim)
        self.mesh = Mesh.single()  # where the experts are; expert_parallel.py sets it

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        """Mix the experts.

        Shapes: x_BSD [B, S, D], B may be 0; returns the same and what the router did.
        Communicates: dispatch and combine over "ep".
        """
        x_TD = x_BSD.flatten(0, 1)
        logits_TE = self.route_logits(x_TD)
        weights_TK, ids_TK = route(logits_TE, self.config.top_k)
        y_TD, choices_E = self.mix(x_TD, weights_TK, ids_TK)
        lse_T = logits_TE.logsumexp(-1)
        routing = Routing(
            choices_E=choices_E,
            prob_sum_E=(logits_TE - lse_T.unsqueeze(-1)).exp().sum(0),
            z_sum=lse_T.square().sum(),
        )
        return y_TD.view_as(x_BSD), routing

    def route_logits(self, x_TD: Tensor) -> Tensor:
        """Return the router's scores [T, E], fp32 (fp64 for fp64 input)."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return functional.linear(x_TD.to(wide), self.router.to(wide))

    def mix(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Run the chosen experts and sum; return [T, D] and the choices per expert [E]."""
        plan = plan_permutation(ids_TK, self.config.num_experts, capacity=self._capacity(ids_TK))
        rows_RD = permute(x_TD, plan)
        rows_QD, way = dispatch(rows_RD, plan.rows_per_expert_E, self.mesh)
        rows_QD = self.experts(rows_QD, way.rows_per_expert_L)
        y_TD = unpermute(combine(rows_QD, way), weights_TK, plan)
        if plan.kept_TK is None:
            return y_TD, plan.rows_per_expert_E
        return y_TD, torch.bincount(ids_TK.flatten(), minlength=self.config.num_experts)

    def _capacity(self, ids_TK: Tensor) -> int | None:
        if self.config.capacity_factor is None:
            return None
        mean = ids_TK.numel() / self.config.num_experts
        return max(1, math.ceil(mean * self.config.capacity_factor))
