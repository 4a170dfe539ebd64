"""The compressors, and the one that settings name.

class      C(x)                                      constant, n elements      bits
Identity   x                                         omega = 0                 32 n
TopK       the k largest magnitudes                  delta = k / n             32 k + positions
RandK      n / k times k entries chosen by chance    omega = n / k - 1         32 k + 64
Dithering  scale * whole number / s, per bucket of   omega = min(B / s^2,      b n + 32 n / B
           B; s = 2^(b - 1) - 1 levels a side          sqrt(B) / s)
           with the maximum as scale                 omega = (sqrt(1 + (B - 1)
                                                       / s^2) - 1) / 2
           with one bit: plus or minus the scale     omega = B - 1
Natural    a power of two beside each entry          omega = 1 / 8             9 n
Sign       mean magnitude * sign, per group of G     delta = 1 / G             n + 32 n / G
Shrunk(C)  C(x) / (1 + omega)                        delta = 1 / (1 + omega)   as C

and a header of 16 bytes for each. k = ceil(fraction * n). TopK writes the positions in the shortest
of three codings (kernels/bitpack.py): 8.6 bits each at one per cent, where ceil(log2 n) would be 25
for 25 million. RandK sends the seed from which the receiver draws the same positions: 8 bytes
instead of those. A receiver that must not let the sender choose positions compares `RandK.seed_of`
with the seed that it has given out.

What is kept of small and of -0.0: Identity and TopK keep every bit of what they send. The others
lose the sign of -0.0, but for Natural, and keep denormals with an absolute error: up to 2**-126
in Natural (the mean is exact), half of the smallest denormal in a scale of Sign.

Source: Stich et al., arXiv 1809.07599 (TopK, RandK); Alistarh et al., QSGD, arXiv 1610.02132
(Dithering with the 2-norm as scale; ours is the maximum unless told otherwise, which makes a 40th
of the error at 4 bits); Horvath et al., arXiv 1905.10988 (Natural); Karimireddy et al., arXiv
1901.09847 (Sign); Beznosikov et al., arXiv 2002.12410 (Shrunk). As SCALLION and SCAFCOM use them:
Huang et al., arXiv 2308.08165.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from gangline.comm.compression import Compressor
from gangline.comm.compression_dense import Dithering, Identity, Natural, Sign
from gangline.comm.compression_settings import CompressionSettings
from gangline.comm.compression_sparse import RandK, TopK
from gangline.comm.compression_wire import Fields

__all__ = [
    "Dithering",
    "Identity",
    "Natural",
    "RandK",
    "Shrunk",
    "Sign",
    "TopK",
    "contractive",
    "make",
]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Shrunk(Compressor):
    """Divide what an unbiased compressor gives by 1 + omega, which makes it contractive.

    The bytes are those of the other, but for its kind in the header.
    """

    inner: Compressor
    kind = "contractive"
    code = 128

    def __post_init__(self) -> None:
        if self.inner.kind != "unbiased":
            raise ValueError(f"{self.inner} is contractive already; use it as it is")

    @property
    def header_code(self) -> int:
        return self.code | self.inner.header_code

    def constant(self, num_elements: int) -> float:
        return 1 / (1 + self.inner.constant(num_elements))

    def parameter(self, num_elements: int) -> int:
        return self.inner.parameter(num_elements)

    def largest_magnitude(self, num_elements: int) -> float:
        return self.inner.largest_magnitude(num_elements)

    def body_bytes(self, num_elements: int) -> int:
        return self.inner.body_bytes(num_elements)

    def encode(self, x_N: Tensor, seed: int) -> list[Tensor]:
        return self.inner.encode(x_N, seed)

    def decode(self, fields: Fields, num_elements: int) -> Tensor:
        return self.inner.decode(fields, num_elements).mul_(self.constant(num_elements))


def contractive(compressor: Compressor) -> Compressor:
    """Return a contractive compressor of the same bytes: itself, or Shrunk."""
    return compressor if compressor.kind == "contractive" else Shrunk(compressor)


_MAKERS: dict[str, Callable[[CompressionSettings], Compressor]] = {
    "identity": lambda settings: Identity(),
    "top_k": lambda settings: TopK(_given(settings.fraction)),
    "rand_k": lambda settings: RandK(_given(settings.fraction)),
    "dithering": lambda settings: Dithering(
        _given(settings.bits), _given(settings.bucket_size), settings.norm or "max"
    ),
    "natural": lambda settings: Natural(),
    "scaled_sign": lambda settings: Sign(),
    "group_sign": lambda settings: Sign(_given(settings.group_size)),
}


def make(settings: CompressionSettings) -> Compressor:
    """Return the compressor that the settings describe."""
    return _MAKERS[settings.kind](settings)


def _given(value: _T | None) -> _T:
    assert value is not None, "CompressionSettings fills in what its kind needs"
    return value
