"""Compressors that send some of the entries: the largest, or any. See compressors.py.

N = elements, K = kept elements
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gangline.comm.compression import Compressor, Payload
from gangline.comm.compression_wire import Fields
from gangline.kernels import bitpack, compress, noise

_LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class TopK(Compressor):
    """Send the entries of largest magnitude; of equal ones, those of lowest index.

    Fields: the values [K] fp32 in the order of their positions; the positions.
    """

    fraction: float
    kind = "contractive"
    code = 2

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    def constant(self, num_elements: int) -> float:
        return num_kept(self.fraction, num_elements) / max(num_elements, 1)

    def parameter(self, num_elements: int) -> int:
        return num_kept(self.fraction, num_elements)

    def body_bytes(self, num_elements: int) -> int:
        kept = num_kept(self.fraction, num_elements)
        return 4 * kept + bitpack.index_bytes(num_elements, kept)

    def encode(self, x_N: Tensor, seed: int) -> list[Tensor]:
        places_K = compress.largest(x_N, num_kept(self.fraction, x_N.numel()))
        return [x_N[places_K], bitpack.pack_indices(places_K, x_N.numel())]

    def decode(self, fields: Fields, num_elements: int) -> Tensor:
        return _scatter(self._entries(fields, num_elements), num_elements)

    def accumulate(self, out_N: Tensor, payload: Payload, *, sign: Literal[1, -1] = 1) -> None:
        fields = self.open(payload, out_N.numel())
        _add_at(out_N, self._entries(fields, out_N.numel()), sign)

    def _entries(self, fields: Fields, num_elements: int) -> tuple[Tensor, Tensor]:
        kept = num_kept(self.fraction, num_elements)
        values_K = fields.floats(kept)
        return fields.indices(num_elements, kept), values_K


@dataclass(frozen=True)
class RandK(Compressor):
    """Send entries chosen by chance, scaled so that the mean is right.

    Fields: the seed of the positions, 8 bytes; the scaled values [K] fp32 in their order. Scaled
    by the sender, so that decoding rounds nothing.
    """

    fraction: float
    kind = "unbiased"
    code = 3

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    def constant(self, num_elements: int) -> float:
        return self._scale(num_elements) - 1

    def parameter(self, num_elements: int) -> int:
        return num_kept(self.fraction, num_elements)

    def largest_magnitude(self, num_elements: int) -> float:
        scale = self._scale(num_elements)
        # The product is rounded twice, the scale once; at the very limit that might be up.
        return _LARGEST if scale == 1 else _LARGEST / scale * (1 - 2.0**-20)

    def body_bytes(self, num_elements: int) -> int:
        return 8 + 4 * num_kept(self.fraction, num_elements)

    def encode(self, x_N: Tensor, seed: int) -> list[Tensor]:
        num = x_N.numel()
        flags_N = noise.random_subset(num, num_kept(self.fraction, num), seed)
        start = torch.frombuffer(bytearray(seed.to_bytes(8, "little")), dtype=torch.uint8)
        return [start.to(x_N.device), _take(x_N, flags_N).mul_(self._scale(num))]

    def decode(self, fields: Fields, num_elements: int) -> Tensor:
        return _scatter(self._entries(fields, num_elements), num_elements)

    def accumulate(self, out_N: Tensor, payload: Payload, *, sign: Literal[1, -1] = 1) -> None:
        fields = self.open(payload, out_N.numel())
        _add_at(out_N, self._entries(fields, out_N.numel()), sign)

    def seed_of(self, payload: Payload, num_elements: int) -> int:
        """Return the seed that the sender says it has used. Raises: PayloadError."""
        return self.open(payload, num_elements).integer()

    def _entries(self, fields: Fields, num_elements: int) -> tuple[Tensor, Tensor]:
        kept, seed = num_kept(self.fraction, num_elements), fields.integer()
        # Checked before the draw, which costs more.
        values_K = fields.floats(kept)
        return noise.random_subset(num_elements, kept, seed), values_K

    def _scale(self, num_elements: int) -> float:
        return num_elements / num_kept(self.fraction, num_elements) if num_elements else 1.0


def num_kept(fraction: float, num_elements: int) -> int:
    """Return ceil(fraction * n), in exact arithmetic on the decimal that was written.

    In floats 0.07 * 100 is more than 7.
    """
    return math.ceil(Fraction(repr(fraction)) * num_elements)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; wanted above 0, to 1")


# Through numpy on the CPU: torch lists the flags first, eight bytes for each.
def _take(x_N: Tensor, flags_N: Tensor) -> Tensor:
    if x_N.is_cuda:
        return x_N[flags_N.to(x_N.device)]
    return torch.from_numpy(x_N.numpy()[flags_N.numpy()])


def _scatter(entries: tuple[Tensor, Tensor], num_elements: int) -> Tensor:
    places, values_K = entries
    if values_K.is_cuda:
        out_N = torch.zeros(num_elements, device=values_K.device)
        out_N[places.to(out_N.device)] = values_K
        return out_N
    out = np.zeros(num_elements, np.float32)  # huge pages: a fourth of the time of torch.zeros
    out[places.numpy()] = values_K.numpy()
    return torch.from_numpy(out)


def _add_at(out_N: Tensor, entries: tuple[Tensor, Tensor], sign: int) -> None:
    places, values_K = entries
    values_K = values_K if sign == 1 else values_K.neg_()
    if out_N.is_cuda:
        out_N[places.to(out_N.device)] += values_K
    else:
        out_N.numpy()[places.numpy()] += values_K.numpy()
