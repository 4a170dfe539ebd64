"""Settings of a compressor, as a job file or a federated app writes them. Torch-free.

    {kind: top_k, fraction: 0.01}
    {kind: dithering, bits: 4}

kind          what is sent of a vector                               settings
identity      everything                                             none
top_k         the entries of largest magnitude                       fraction
rand_k        entries chosen by chance, scaled up                    fraction
dithering     every entry, rounded by chance to one of 2**bits       bits, bucket_size, norm
              levels of its bucket's scale
natural       every entry, rounded by chance to a power of two       none
scaled_sign   every sign, and one scale                              none
group_sign    every sign, and one scale per group                    group_size
"""

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

CompressionKind = Literal[
    "identity", "top_k", "rand_k", "dithering", "natural", "scaled_sign", "group_sign"
]
# Which settings a kind has, and what they are when left out; ... = must be given.
_SETTINGS: dict[str, dict[str, Any]] = {
    "identity": {},
    "top_k": {"fraction": ...},
    "rand_k": {"fraction": ...},
    "dithering": {"bits": 4, "bucket_size": 512, "norm": "max"},
    "natural": {},
    "scaled_sign": {},
    "group_sign": {"group_size": 512},
}
# Both travel in 24 bits of a payload's header.
MAX_BUCKET = 2**24 - 1


class CompressionSettings(BaseModel):
    """Choose how a vector is compressed. What a kind does not have stays null."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    # Where the fields are in a file, for messages; a section of a file overrides it.
    path: ClassVar[str] = ""

    kind: CompressionKind = Field(description="The compressor; see docs/compression.md.")
    fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="top_k and rand_k: part of the entries that is sent, rounded up.",
    )
    bits: int | None = Field(
        default=None, ge=1, le=8, description="dithering: bits per entry; 4 where left out."
    )
    bucket_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BUCKET,
        description="dithering: entries that share a scale; 512 where left out.",
    )
    norm: Literal["max", "l2"] | None = Field(
        default=None,
        description="dithering: scale of a bucket, its largest magnitude or its Euclidean norm (as "
        "the papers write it). max where left out, with far less error.",
    )
    group_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BUCKET,
        description="group_sign: entries that share a scale; 512 where left out.",
    )

    @property
    def is_contractive(self) -> bool:
        """Tell whether the compressor is contractive; the others are unbiased."""
        return self.kind in ("top_k", "scaled_sign", "group_sign")

    @property
    def bytes_per_element(self) -> float:
        """Return the payload's bytes per entry of a long vector: an estimate, for plans.

        `Compressor.payload_bytes` has the exact number.
        """
        part = self.fraction or 1.0
        low_bits = math.floor(-math.log2(part))
        position_bits = min(1.0, part * (low_bits + 1) + 2.0**-low_bits)
        bits = {
            "identity": 32.0,
            "top_k": 32 * part + position_bits,
            "rand_k": 32 * part,
            "dithering": (self.bits or 0) + 32 / (self.bucket_size or 1),
            "natural": 9.0,
            "scaled_sign": 1.0,
            "group_sign": 1 + 32 / (self.group_size or 1),
        }
        return bits[self.kind] / 8

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Write the kind's defaults into the settings, so that a resolved job shows them."""
        kind = data.get("kind") if isinstance(data, dict) else None
        if not isinstance(kind, str) or kind not in _SETTINGS:
            return data
        defaults = _SETTINGS[kind]
        missing = {
            name: value
            for name, value in defaults.items()
            if value is not ... and data.get(name) is None
        }
        return {**data, **missing}

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> Self:
        # Run on a half-built object, too, for a job file with other faults: no kind, no defaults.
        kind = getattr(self, "kind", None)
        if not isinstance(kind, str) or kind not in _SETTINGS:
            return self
        has, at = _SETTINGS[kind], self.path
        for name in ("fraction", "bits", "bucket_size", "norm", "group_size"):
            is_given = getattr(self, name) is not None
            if is_given and name not in has:
                owners = [kind for kind, settings in _SETTINGS.items() if name in settings]
                raise ValueError(
                    f"{at}{name} is not a setting of {at}kind {kind}; leave {at}{name} out, or set "
                    f"{at}kind to {' or '.join(owners)}"
                )
            if not is_given and has.get(name) is ...:
                raise ValueError(
                    f"{at}{name} is missing, which {at}kind {kind} needs: the part of the entries "
                    f"to send; set {at}{name} to such as 0.01"
                )
        return self
