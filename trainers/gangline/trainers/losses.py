"""What a step minimises, as sums over tokens, so that it does not depend on who has which token.

    loss = ( sum_t  -ln p(target_t)
           + sum_layers [ a * E * sum_i f_i P_i  +  b * sum_t z_t^2 ] ) / tokens of the step

with, per mixture layer, f_i the part of all choices that went to expert i, P_i the sum over
tokens of expert i's probability, z_t = logsumexp of the router's scores, a = load_balance_coef
and b = z_loss_coef.

Source: load balance, Fedus et al., "Switch Transformers", arXiv 2101.03961, eq. 4, with f over all
K choices; z loss, Zoph et al., "ST-MoE", arXiv 2202.08906, eq. 5.
Where we differ: f_i is counted over ALL ranks' tokens of a microbatch, not over one rank's. So the
loss is the same for every layout, and experts may specialise within a rank. It costs one small
all-reduce per microbatch, after the forward: f has no gradient, and nothing in the forward needs
it. With gradient accumulation f is that of each microbatch, as the others are gone or yet to come.

T = tokens, V = vocabulary, M = mixture layers, E = experts
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gangline.comm.collectives import all_reduce
from gangline.comm.mesh import Mesh
from gangline.trainers.moe import Routing


@dataclass(frozen=True)
class RouterLosses:
    """The router's losses of a microbatch, summed over this rank's tokens and over layers."""

    load_balance: Tensor  # its sum over ranks / tokens / layers is 1 at perfect balance
    z: Tensor
    choices_ME: Tensor  # of this rank, int64


def token_loss(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return the sum over tokens of -ln p(target), in fp32 at least; 0 for no tokens."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return functional.cross_entropy(logits_TV.to(wide), targets_T, reduction="sum")


def router_losses(routings: list[Routing], mesh: Mesh) -> RouterLosses:
    """Return the router's losses of this rank's tokens, balanced over all ranks' tokens.

    Communicates: the choices, over "world"; nothing for a dense model.
    """
    if not routings:
        zero = torch.zeros((), device=mesh.device)
        return RouterLosses(zero, zero, torch.zeros(0, 0, dtype=torch.int64, device=mesh.device))
    choices_ME = torch.stack([routing.choices_E for routing in routings])
    everywhere_ME = choices_ME.double()
    all_reduce(everywhere_ME, mesh, "world").wait()
    num_choices_M1 = everywhere_ME.sum(1, keepdim=True).clamp(min=1)
    prob_sum_ME = torch.stack([routing.prob_sum_E for routing in routings])
    parts_ME = (everywhere_ME / num_choices_M1).to(prob_sum_ME.dtype)
    return RouterLosses(
        load_balance=choices_ME.shape[1] * (parts_ME * prob_sum_ME).sum(),
        z=torch.stack([routing.z_sum for routing in routings]).sum(),
        choices_ME=choices_ME,
    )
