"""Draw the weights of a new model.

Every tensor is drawn by a generator of its own, seeded by (seed, name) and, for experts, the
GLOBAL number of the expert. So a model of a given seed is the same whatever the layout, and
however the order of its modules changes.

Matrices are normal with deviation 1/sqrt(inputs); those that write into the residual stream have
it divided by sqrt(2 layers), so that the stream does not grow with depth (Radford et al., GPT-2,
section 2.3). Embeddings have deviation 0.02, which starts the loss at ln(vocabulary).
"""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gangline.trainers.model import Transformer, is_expert

_EMBEDDING_STD = 0.02


@torch.no_grad()
def initialize(
    model: Transformer,
    seed: int,
    *,
    first_expert: int = 0,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Draw every weight of the model, in place; `first_expert` is the global number of local 0.

    `tensors` are what to write into, by name, where that is not the model's parameters.
    """
    residual = 1 / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters() if tensors is None else tensors:
        if parameter.dim() == 1:
            parameter.fill_(1.0)  # norms
        elif name in ("embedding", "head"):
            _draw(parameter, _EMBEDDING_STD, seed, name)
        else:
            # Experts are [inputs, outputs], the others [outputs, inputs].
            num_inputs = parameter.shape[1]
            scale = residual if name.endswith((".out", ".down")) else 1.0
            std = scale / math.sqrt(num_inputs)
            if is_expert(name):
                for local, expert in enumerate(parameter):
                    _draw(expert, std, seed, f"{name}/{first_expert + local}")
            else:
                _draw(parameter, std, seed, name)


def _draw(tensor: Tensor, std: float, seed: int, name: str) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    # On the CPU for every device, so that a GPU starts from the same weights.
    values = torch.empty(tensor.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
    tensor.copy_(values)
