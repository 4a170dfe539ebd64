"""Compressors that send something of every entry. See compressors.py.

N = elements, G = buckets or groups
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gangline.comm.compression import Compressor, NonFiniteError
from gangline.comm.compression_settings import MAX_BUCKET
from gangline.comm.compression_wire import Fields, is_finite
from gangline.kernels import bitpack, compress


@dataclass(frozen=True)
class Identity(Compressor):
    """Send everything."""

    kind = "unbiased"
    code = 1

    def constant(self, num_elements: int) -> float:
        return 0.0

    def body_bytes(self, num_elements: int) -> int:
        return 4 * num_elements

    def encode(self, x_N: Tensor, seed: int) -> list[Tensor]:
        return [x_N]

    def decode(self, fields: Fields, num_elements: int) -> Tensor:
        return fields.floats(num_elements)


@dataclass(frozen=True)
class Dithering(Compressor):
    """Round every entry by chance to one of 2**bits - 1 levels (two, with one bit) of its bucket.

    Fields: the scales [G] fp32; the codes [N] of `bits` bits, of which 2**bits - 1 does not occur,
    but with one bit.
    """

    bits: int = 4
    bucket_size: int = 512
    norm: Literal["max", "l2"] = "max"
    kind = "unbiased"
    code = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; wanted 1 to 8")
        _check_size("bucket_size", self.bucket_size)

    @property
    def levels(self) -> float:
        """Return s: a value is scale * (code - s) / s."""
        return 0.5 if self.bits == 1 else 2 ** (self.bits - 1) - 1

    def constant(self, num_elements: int) -> float:
        bucket = min(self.bucket_size, max(num_elements, 1))
        if self.bits == 1:
            return bucket - 1
        if self.norm == "max":
            # With u = s |v| / max, an entry's error is u (1 - u) / s^2 max^2 at worst, for u < 1.
            # The worst vector has one entry at the maximum and the others at one u; of all u, at
            # 1 / (1 + sqrt(1 + (B - 1) / s^2)). So this is reached, and below the bound of l2.
            return (math.sqrt(1 + (bucket - 1) / self.levels**2) - 1) / 2
        return min(bucket / self.levels**2, math.sqrt(bucket) / self.levels)

    def parameter(self, num_elements: int) -> int:
        return self.bits << 24 | self.bucket_size

    def body_bytes(self, num_elements: int) -> int:
        num_scales = -(-num_elements // self.bucket_size)
        return 4 * num_scales + bitpack.packed_bytes(num_elements, self.bits)

    def encode(self, x_N: Tensor, seed: int) -> list[Tensor]:
        measure = compress.bucket_max if self.norm == "max" else compress.bucket_norm
        scales_G = measure(x_N, self.bucket_size)
        if not is_finite(scales_G):
            raise NonFiniteError(
                "the Euclidean norm of a bucket is above the largest float; take norm: max"
            )
        codes_N = compress.dither(x_N, scales_G, self.bucket_size, self.levels, seed)
        return [scales_G, bitpack.pack(codes_N, self.bits)]

    def decode(self, fields: Fields, num_elements: int) -> Tensor:
        scales_G = fields.scales(-(-num_elements // self.bucket_size))
        codes_N = fields.codes(num_elements, self.bits, largest=int(2 * self.levels))
        return compress.undither(codes_N, scales_G, self.bucket_size, self.levels)


@dataclass(frozen=True)
class Natural(Compressor):
    """Round every entry by chance to a power of two beside it.

    Fields: the exponents' bits [N] uint8, of which 255 does not occur; the signs [N] of one bit.
    """

    kind = "unbiased"
    code = 5

    def constant(self, num_elements: int) -> float:
        return 1 / 8

    def largest_magnitude(self, num_elements: int) -> float:
        return 2.0**127

    def body_bytes(self, num_elements: int) -> int:
        return num_elements + bitpack.packed_bytes(num_elements, 1)

    def encode(self, x_N: Tensor, seed: int) -> list[Tensor]:
        exponents_N, signs_N = compress.round_to_powers(x_N, seed)
        return [exponents_N, bitpack.pack(signs_N, 1)]

    def decode(self, fields: Fields, num_elements: int) -> Tensor:
        exponents_N = fields.codes(num_elements, 8, largest=254)
        return compress.powers(exponents_N, fields.codes(num_elements, 1, largest=1))


@dataclass(frozen=True)
class Sign(Compressor):
    """Send every sign, and the mean magnitude of each group; None = of the whole vector.

    Zero counts as positive. delta is 1 / G in the worst case, one entry among zeros; it is
    ||x_g||_1^2 / (G ||x_g||_2^2) for the vector at hand, 0.64 where entries are normal.
    Fields: the scales [G] fp32; the signs [N] of one bit, 1 for positive.
    """

    group_size: int | None = None
    kind = "contractive"
    code = 6

    def __post_init__(self) -> None:
        if self.group_size is not None:
            _check_size("group_size", self.group_size)

    def constant(self, num_elements: int) -> float:
        return 1 / self._size(num_elements)

    def parameter(self, num_elements: int) -> int:
        return self.group_size or 0

    def body_bytes(self, num_elements: int) -> int:
        num_scales = -(-num_elements // self._size(num_elements))
        return 4 * num_scales + bitpack.packed_bytes(num_elements, 1)

    def encode(self, x_N: Tensor, seed: int) -> list[Tensor]:
        scales_G = compress.bucket_mean(x_N, self._size(x_N.numel()))
        return [scales_G, bitpack.pack((x_N >= 0).view(torch.uint8), 1)]

    def decode(self, fields: Fields, num_elements: int) -> Tensor:
        size = self._size(num_elements)
        scales_G = fields.scales(-(-num_elements // size))
        signs_N = fields.codes(num_elements, 1, largest=1)
        return compress.undither(signs_N, scales_G, size, 0.5)

    def _size(self, num_elements: int) -> int:
        return max(min(self.group_size or num_elements, num_elements), 1)


def _check_size(name: str, size: int) -> None:
    if not 1 <= size <= MAX_BUCKET:
        raise ValueError(f"{name} is {size}; wanted 1 to {MAX_BUCKET}")
