"""Compressors and vectors on which the tests of compression agree."""

import math

import torch
from torch import Tensor

from gangline.comm.compression import Compressor
from gangline.comm.compressors import (
    Dithering,
    Identity,
    Natural,
    RandK,
    Shrunk,
    Sign,
    TopK,
)

UNBIASED: list[Compressor] = [
    Identity(),
    RandK(0.3),
    RandK(0.75),
    Dithering(1, 64),
    Dithering(1, 64, "l2"),
    Dithering(2, 64),
    Dithering(2, 64, "l2"),
    Dithering(3, 16),
    Dithering(4, 512),
    Dithering(4, 64, "l2"),
    Dithering(8, 64),
    Natural(),
]
CONTRACTIVE: list[Compressor] = [
    TopK(0.01),
    TopK(0.1),
    TopK(0.6),
    TopK(1.0),
    Sign(),
    Sign(7),
    Sign(64),
]
SHRUNK: list[Compressor] = [Shrunk(inner) for inner in UNBIASED]
ALL = [*UNBIASED, *CONTRACTIVE, *SHRUNK]


def worst_for_dithering(size: int, levels: float) -> Tensor:
    """Return the vector whose error reaches the bound: one entry 1, the others u / levels."""
    x = torch.full((size,), 1 / (1 + math.sqrt(1 + (size - 1) / levels**2)) / levels)
    x[0] = 1.0
    return x


def vectors(size: int) -> dict[str, Tensor]:
    """Return ordinary and adversarial vectors of normal floats, none of them zero."""
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(size, generator=generator)
    one = torch.zeros(size)
    one[size // 2] = -3.0
    spread = normal.sign() * 2.0 ** torch.linspace(-30, 30, size)
    return {
        "normal": normal,
        "one entry": one,
        "equal": torch.full((size,), 0.3),
        "opposite": torch.tensor([0.7, -0.7]).repeat(size)[:size],
        "heavy tails": normal / torch.rand(size, generator=generator).clamp(1e-3),
        "spread": spread,
        "just above powers of two": 1.0001 * 2.0 ** (normal * 3).round(),
        "worst for natural": torch.full((size,), 4 / 3),
        "worst for 2 bits": worst_for_dithering(size, 1),
        "worst for 4 bits": worst_for_dithering(size, 7),
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
    }
