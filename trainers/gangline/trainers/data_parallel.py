"""Keep replicas equal: one gradient sum per step over the ranks that hold the same parameters.

All weights live in one flat fp32 buffer and all gradients in another; the model's parameters and
their `.grad` are views. So a step's gradients are summed by one all-reduce (two with expert
parallelism), clipped by one product and applied by one pass of the optimizer, and nothing is
copied in between.

The buffer has three parts:
    matrices   replicated over the world, weight decay
    vectors    replicated over the world, no weight decay
    experts    divided over "ep", replicated over "dp", weight decay

Every rank's loss is a SUM over its tokens divided by the tokens of the whole step, so gradients
add up to those of one process whatever the division of the batch, even or not, also when a rank
has no tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gangline.comm.collectives import all_reduce
from gangline.comm.mesh import Mesh
from gangline.trainers.model import is_expert

# Each parameter starts on a cache line, as a tensor of its own would.
_ALIGNMENT = 64 // 4


@dataclass(frozen=True)
class Part:
    """A run of the flat buffers."""

    start: int
    end: int


class FlatParameters:
    """Hold a model's weights and gradients in two flat buffers.

    The model's parameters become views, with the values that they had; `.grad` must stay what it
    is here, so gradients are zeroed by `grads.zero_()` and never set to None.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        order = {
            "matrices": [n for n, p in named if not is_expert(n) and p.dim() > 1],
            "vectors": [n for n, p in named if not is_expert(n) and p.dim() <= 1],
            "experts": [n for n, p in named if is_expert(n)],
        }
        parameters = dict(named)
        self.parts: dict[str, Part] = {}
        self._places: dict[str, tuple[int, torch.Size]] = {}
        end = 0
        for part, names in order.items():
            start = end
            for name in names:
                self._places[name] = (end, parameters[name].shape)
                end += -(-parameters[name].numel() // _ALIGNMENT) * _ALIGNMENT
            self.parts[part] = Part(start, end)
        device = named[0][1].device
        self.weights = torch.zeros(end, dtype=torch.float32, device=device)
        self.grads = torch.zeros_like(self.weights)
        weights, grads = self.named_views(self.weights), self.named_views(self.grads)
        for name, parameter in named:
            weights[name].copy_(parameter.data)
            parameter.data = weights[name]
            parameter.grad = grads[name]

    def named_views(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a buffer of this layout into the parameters' shapes; views, not copies."""
        return {
            name: flat[start : start + shape.numel()].view(shape)
            for name, (start, shape) in self._places.items()
        }

    def part(self, flat: Tensor, name: str) -> Tensor:
        """Return one part of a buffer of this layout; a view."""
        part = self.parts[name]
        return flat[part.start : part.end]

    def reduce_gradients(self, mesh: Mesh) -> None:
        """Sum the gradients over all ranks that hold the same parameters, in place.

        Communicates: replicated parameters over "world", experts over "dp"; as one all-reduce
        where the two are the same ranks.
        Guarantees: replicas get bit-identical sums.
        """
        first_expert = self.parts["experts"].start
        if mesh.axis_size("dp") == mesh.world_size:
            all_reduce(self.grads, mesh, "world").wait()
            return
        replicated = all_reduce(self.grads[:first_expert], mesh, "world")
        experts = all_reduce(self.grads[first_expert:], mesh, "dp")
        replicated.wait()
        experts.wait()

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Return the squared norms of the gradients, of replicated parameters and of experts."""
        first_expert = self.parts["experts"].start
        replicated = torch.linalg.vector_norm(self.grads[:first_expert])
        experts = torch.linalg.vector_norm(self.grads[first_expert:])
        return replicated.double().square(), experts.double().square()
