"""What a compressor of fp32 vectors promises: its class, its constant, its bytes, its refusals.

unbiased      E C(x) = x and E ||C(x) - x||^2 <= omega ||x||^2; `constant` is omega
contractive   E ||C(x) - x||^2 <= (1 - delta) ||x||^2;           `constant` is delta

The compressors themselves are in compressors.py, the bytes in compression_wire.py.

Inputs. Every finite vector compresses: zeros, one element, none (a header only), ties, denormals,
-0.0. NaN and infinities are refused with NonFiniteError, and so is a magnitude that would not
survive (`largest_magnitude`). Who must send something all the same, because others wait for it,
sends `non_finite_payload`; its receivers get NonFinitePayloadError.

Guarantees: `compress` depends on the vector, the settings and the seed alone. `decompress` gives
the same bits on every platform, since each result is rounded in a stated order, and refuses what
no sender writes with PayloadError, in memory of less than three times that of the result. The
scales of Dithering and Sign are sums of floats, so there another platform may write another last
bit.

N = elements
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gangline.comm.compression_wire import (
    HEADER_BYTES,
    MAX_ELEMENTS,
    CompressionError,
    Fields,
    NonFiniteError,
    NonFinitePayloadError,
    Payload,
    PayloadError,
    non_finite_payload,
    write_payload,
)

__all__ = [
    "CompressionError",
    "Compressor",
    "Kind",
    "NonFiniteError",
    "NonFinitePayloadError",
    "Payload",
    "PayloadError",
]

Kind = Literal["unbiased", "contractive"]
_LARGEST = float(torch.finfo(torch.float32).max)


class Compressor(ABC):
    """Turn vectors of fp32 into bytes and back. Stateless: one serves any number of vectors."""

    kind: ClassVar[Kind]
    code: ClassVar[int]  # in the header of a payload

    @abstractmethod
    def constant(self, num_elements: int) -> float:
        """Return omega of an unbiased, delta of a contractive compressor."""

    @abstractmethod
    def body_bytes(self, num_elements: int) -> int:
        """Return the length of the fields of a vector that is not empty."""

    @abstractmethod
    def encode(self, x_N: Tensor, seed: int) -> list[Tensor]:
        """Return the fields of a finite vector that is not empty."""

    @abstractmethod
    def decode(self, fields: Fields, num_elements: int) -> Tensor:
        """Return the vector of the fields; PayloadError unless they are as `encode` writes them."""

    def parameter(self, num_elements: int) -> int:
        """Return what the header says beside the kind."""
        return 0

    def largest_magnitude(self, num_elements: int) -> float:
        """Return the largest magnitude that survives."""
        return _LARGEST

    @property
    def header_code(self) -> int:
        return self.code

    def payload_bytes(self, num_elements: int) -> int:
        """Return the exact length of the payload of a vector."""
        if not 0 <= num_elements <= MAX_ELEMENTS:
            raise ValueError(
                f"a vector of {num_elements} elements; wanted 0 to {MAX_ELEMENTS}: cut it into "
                "buckets"
            )
        return HEADER_BYTES + (self.body_bytes(num_elements) if num_elements else 0)

    def compress(self, x_N: Tensor, *, seed: int = 0) -> Tensor:
        """Return the payload of a vector, the same for the same seed (0 to 2**64 - 1).

        Shapes: x_N [N] fp32; returns [payload_bytes(N)] uint8 on its device.
        Raises: NonFiniteError; ValueError for another shape or type.
        """
        if x_N.dtype is not torch.float32 or x_N.dim() != 1:
            raise ValueError(
                f"a compressor takes fp32 vectors, got {x_N.dtype} of shape {tuple(x_N.shape)}; "
                "flatten it, or convert it with .float()"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; wanted 0 to 2**64 - 1")
        num = x_N.numel()
        self.payload_bytes(num)
        self._check_finite(x_N)
        fields = self.encode(x_N.detach().contiguous(), seed) if num else []
        return write_payload(self.header_code, self.parameter(num), num, fields)

    def decompress(self, payload: Payload, num_elements: int) -> Tensor:
        """Return the vector of a payload, trusting no byte of it.

        Shapes: payload [payload_bytes(num_elements)]; returns [num_elements] fp32.
        Raises: PayloadError, or its kind NonFinitePayloadError.
        """
        fields = self.open(payload, num_elements)
        if num_elements == 0:
            return torch.empty(0)
        return self.decode(fields, num_elements)

    def accumulate(self, out_N: Tensor, payload: Payload, *, sign: Literal[1, -1] = 1) -> None:
        """Add the vector of a payload to `out_N`, or subtract it.

        Raises: as `decompress`; `out_N` is then unchanged.
        """
        out_N.add_(self.decompress(payload, out_N.numel()), alpha=sign)

    def non_finite_payload(self, num_elements: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the payload that says that this vector was not finite; as long as any other."""
        return non_finite_payload(
            self.header_code,
            self.parameter(num_elements),
            num_elements,
            self.payload_bytes(num_elements),
            torch.device(device),
        )

    def open(self, payload: Payload, num_elements: int) -> Fields:
        """Check length and header of a payload and return its fields. Raises: PayloadError."""
        return Fields(
            payload,
            kind=self.header_code,
            parameter=self.parameter(num_elements),
            num_elements=num_elements,
            num_bytes=self.payload_bytes(num_elements),
        )

    def _check_finite(self, x_N: Tensor) -> None:
        if x_N.numel() == 0:
            return
        lowest, highest = (float(value) for value in torch.stack(torch.aminmax(x_N)).tolist())
        largest, limit = max(-lowest, highest), self.largest_magnitude(x_N.numel())
        if not math.isfinite(largest):
            raise NonFiniteError(
                f"a vector of {x_N.numel()} elements has NaN or infinities; leave it out, or send "
                "non_finite_payload if others wait for it"
            )
        if largest > limit:
            raise NonFiniteError(
                f"a vector of {x_N.numel()} elements has a magnitude of {largest:g}; "
                f"{type(self).__name__} takes up to {limit:g}"
            )
