"""The bytes of a compressed vector: one header, then fields, all little-endian, of known length.

    offset  bytes
    0       2      "GC"
    2       1      version, 1
    3       1      kind: 1 identity, 2 top_k, 3 rand_k, 4 dithering, 5 natural, 6 sign; + 128 where
                   the receiver shrinks what it decodes (compression.Shrunk)
    4       4      parameter of the kind: the number of entries sent, bits << 24 | bucket size, or
                   the group size; 0 where there is none
    8       4      number of elements of the vector
    12      4      status: 0 = fields follow, 1 = the vector was not finite, and zeros follow
    16      ...    fields of the kind (compression.py); none for an empty vector

The length is a function of kind, parameter and number of elements, so a receiver allots it before
anything arrives, and a payload of another length is refused unread. Every byte is checked or free:
for a given vector there is one way to write it, and padding bits are zero.

There is no checksum. TCP has one, whoever wants to harm would make it right, and each field is
checked for what it must be.

CompressionError          ours, a ValueError
|- NonFiniteError         the vector has NaN or infinities, or is too large for the compressor
`- PayloadError           bytes refused: not what a sender of this compressor writes
   `- NonFinitePayloadError   the sender says that its vector was not finite
"""

import struct
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gangline.kernels import bitpack

HEADER_BYTES = 16
VERSION = 1
MAX_ELEMENTS = bitpack.MAX_POSITIONS
_MAGIC = b"GC"
_HEADER = struct.Struct("<2sBBIII")
_FINITE, _NOT_FINITE = 0, 1
_T = TypeVar("_T")


class CompressionError(ValueError):
    """A vector cannot be compressed, or a payload not be read."""


class NonFiniteError(CompressionError):
    """The vector has NaN or infinities, or is too large for the compressor."""


class PayloadError(CompressionError):
    """Bytes are not what a sender of this compressor writes."""


class NonFinitePayloadError(PayloadError):
    """The sender says that its vector was not finite."""


Payload = Tensor | bytes | bytearray | memoryview


def write_payload(kind: int, parameter: int, num_elements: int, fields: list[Tensor]) -> Tensor:
    """Put header and fields into one buffer.

    Shapes: returns [header and fields] uint8, on the device of the fields.
    """
    header = _HEADER.pack(_MAGIC, VERSION, kind, parameter, num_elements, _FINITE)
    start = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    parts = [start, *(field.view(torch.uint8) for field in fields)]
    if parts[-1].is_cuda:
        return torch.cat([part.to(parts[-1].device) for part in parts])
    # numpy asks the kernel for huge pages: a fourth of the time for 100 MB of new memory.
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))


def non_finite_payload(
    kind: int, parameter: int, num_elements: int, num_bytes: int, device: torch.device
) -> Tensor:
    """Return the payload that stands for a vector that was not finite."""
    header = _HEADER.pack(_MAGIC, VERSION, kind, parameter, num_elements, _NOT_FINITE)
    payload = torch.zeros(num_bytes, dtype=torch.uint8)
    payload[:HEADER_BYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    return payload.to(device)


class Fields:
    """Read a payload from front to back, trusting no byte of it.

    Raises, in every method: PayloadError.
    """

    def __init__(
        self, payload: Payload, *, kind: int, parameter: int, num_elements: int, num_bytes: int
    ) -> None:
        got = payload.numel() if isinstance(payload, Tensor) else memoryview(payload).nbytes
        if got != num_bytes:
            raise PayloadError(
                f"the payload has {got} bytes, wanted {num_bytes} for {num_elements} elements"
            )
        data = payload
        if not isinstance(data, Tensor):
            # A copy: torch has no read-only tensors, and warns.
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data.dtype is not torch.uint8 or data.dim() != 1:
            raise PayloadError(
                f"the payload is {data.dtype} of {data.dim()} dims, wanted uint8 of 1"
            )
        header = _HEADER.unpack(data[:HEADER_BYTES].cpu().numpy().tobytes())
        wanted = (_MAGIC, VERSION, kind, parameter, num_elements)
        names = ("magic", "version", "kind", "parameter", "number of elements")
        for name, found, value in zip(names, header, wanted, strict=False):
            if found != value:
                raise PayloadError(
                    f"the payload's {name} is {found!r}, wanted {value!r}; sender and receiver "
                    "must have the same compression settings and vector"
                )
        self._rest = data[HEADER_BYTES:]
        status = header[-1]
        if status == _NOT_FINITE and not bool(self._rest.any()):
            raise NonFinitePayloadError("the sender's vector was not finite")
        if status != _FINITE:
            raise PayloadError(f"the payload's status is {status}, wanted 0, or 1 before zeros")

    def bytes(self, num: int) -> Tensor:
        """Take the next `num` bytes; a view."""
        taken, self._rest = self._rest[:num], self._rest[num:]
        return taken

    def integer(self) -> int:
        """Take an unsigned integer of 8 bytes."""
        return int.from_bytes(self.bytes(8).cpu().numpy().tobytes(), "little")

    def floats(self, num: int) -> Tensor:
        """Take `num` finite fp32 values."""
        # A copy, because a view of other type needs an alignment that a payload may not have.
        data = self.bytes(4 * num)
        data = data.clone() if data.is_cuda else torch.from_numpy(data.numpy().copy())
        values = data.view(torch.float32)
        if not is_finite(values):
            raise PayloadError("the payload has NaN or infinities")
        return values

    def scales(self, num: int) -> Tensor:
        """Take `num` finite fp32 values that are not negative."""
        values = self.floats(num)
        if num and float(values.amin()) < 0:
            raise PayloadError(f"the payload has a negative scale, {float(values.amin())}")
        return values

    def codes(self, num: int, width: int, *, largest: int) -> Tensor:
        """Take `num` integers of `width` bits, 1 to 8, none above `largest`; uint8."""
        data = self.bytes(bitpack.packed_bytes(num, width))
        _read(lambda: bitpack.check_padding(data, num, width))
        values = bitpack.unpack(data, num, width)
        if largest < 2**width - 1 and num and int(values.amax()) > largest:
            raise PayloadError(f"the payload has code {int(values.amax())}, wanted 0 to {largest}")
        return values

    def indices(self, num_elements: int, num_kept: int) -> Tensor:
        """Take a list of positions, as `bitpack.unpack_indices` gives it."""
        data = self.bytes(bitpack.index_bytes(num_elements, num_kept))
        return _read(lambda: bitpack.unpack_indices(data, num_elements, num_kept))


def is_finite(values: Tensor) -> bool:
    """Tell whether all values are finite; 25 times as fast as isfinite().all() on the CPU."""
    if values.numel() == 0:
        return True
    # A NaN anywhere becomes both.
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def _read(call: Callable[[], _T]) -> _T:
    try:
        return call()
    except ValueError as error:
        raise PayloadError(f"the payload is damaged: {error}") from error
