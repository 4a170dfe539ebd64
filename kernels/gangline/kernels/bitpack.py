"""Pack small integers, and sorted lists of positions, into as few bytes as they need.

Layout of integers of `width` bits, 0 to 32: first their whole bytes as planes, plane j holding
byte j of every value; then what is left of them, width % 8 bits each, back to back from the lowest
bit of the first byte up. Up to 8 bits that is the plain bit stream; above, it is as long and takes
a quarter of the time. Bits after the last value are zero.

A sorted list of k distinct positions below n goes in the shorter of two codings; which one, and its
length, are functions of (n, k) alone:
    bitmap      n bits, one per position
    Elias-Fano  with l = floor(log2(n / k)): the low l bits of each position, packed; then a bitmap
                of k + ((n - 1) >> l) bits, in which position number j sets bit (position >> l) + j.
                About k (2 + log2(n / k)) bits, half a bit more per position than any coding needs,
                and at most a byte more in all than positions of ceil(log2 n) bits each
Source: P. Elias, "Efficient storage and retrieval by content and address of static files", J. ACM
21 (1974); R. Fano, "On the number of bits required to implement an associative memory" (1971).

On the CPU numpy does the work, on views that share memory, in blocks that stay in the cache; on
CUDA plain torch does. Both give the same bytes. On one core (AMD EPYC, AVX-512) 25 million codes of
4 bits take 6 ms to pack, 4 s in the plain form; 250,000 positions below 25 million take 1 ms to
write and 4 to read.

N = values, K = positions, B = bytes
"""

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Values of one block; a multiple of 8, so that blocks end on whole bytes.
_BLOCK = 1 << 16
MAX_POSITIONS = 2**31 - 1

Bytes = NDArray[np.uint8]

if sys.byteorder != "little":
    raise ImportError("gangline packs through little-endian views; this machine is big-endian")


def packed_bytes(num: int, width: int) -> int:
    """Return how many bytes `num` values of `width` bits take."""
    return -(-num * width // 8)


def pack_ref(values_N: Tensor, width: int) -> Tensor:
    """Pack in plain torch, bit by bit; the truth for `pack`."""
    values_N = values_N.to(torch.int64)
    parts = [((values_N >> (8 * plane)) & 255).to(torch.uint8) for plane in range(width // 8)]
    rest, done = width % 8, width // 8 * 8
    bits = (
        (values_N[:, None] >> (done + torch.arange(rest, device=values_N.device))) & 1
    ).flatten()
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    parts.append((bits << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8))
    return torch.cat(parts)


def unpack_ref(data_B: Tensor, num: int, width: int) -> Tensor:
    """Unpack in plain torch, bit by bit; the truth for `unpack`."""
    values_N = torch.zeros(num, dtype=torch.int64, device=data_B.device)
    for plane in range(width // 8):
        values_N |= data_B[plane * num : (plane + 1) * num].to(torch.int64) << (8 * plane)
    rest, done = width % 8, width // 8 * 8
    tail = data_B[width // 8 * num :].to(torch.int64)
    bits = ((tail[:, None] >> torch.arange(8, device=tail.device)) & 1).flatten()
    bits = bits[: num * rest].view(num, rest)
    values_N |= (bits << (done + torch.arange(rest, device=tail.device))).sum(1)
    return values_N.to(torch.uint8) if width <= 8 else values_N


def pack(values_N: Tensor, width: int) -> Tensor:
    """Pack integers of `width` bits, 0 to 32.

    Shapes: values_N [N] in [0, 2**width), uint8 up to 8 bits, int64 above; returns
    [packed_bytes(N, width)] uint8.
    """
    if values_N.is_cuda:
        return pack_ref(values_N, width)
    values = values_N.contiguous().numpy()
    out = np.empty(packed_bytes(len(values), width), np.uint8)
    num, planes = len(values), width // 8
    for plane in range(planes):
        np.copyto(
            out[plane * num : (plane + 1) * num], values >> (8 * plane) & 255, casting="unsafe"
        )
    if rest := width % 8:
        codes = values if width < 8 else (values >> (8 * planes)).astype(np.uint8)
        _pack_narrow(codes, rest, out[planes * num :])
    return torch.from_numpy(out)


def unpack(data_B: Tensor, num: int, width: int) -> Tensor:
    """Unpack `num` integers; the inverse of `pack`.

    Shapes: data_B [packed_bytes(num, width)] uint8; returns [num], uint8 up to 8 bits, else int64.
    """
    if data_B.is_cuda:
        return unpack_ref(data_B, num, width)
    data, planes, rest = data_B.contiguous().numpy(), width // 8, width % 8
    if width < 8:
        return torch.from_numpy(_unpack_narrow(data, num, rest))
    if width == 8:
        return torch.from_numpy(data[:num].copy())
    values = np.zeros(num, np.int64)
    if rest:
        values |= _unpack_narrow(data[planes * num :], num, rest)
    for plane in reversed(range(planes)):
        values <<= 8
        values |= data[plane * num : (plane + 1) * num]
    return torch.from_numpy(values)


def is_bitmap(num_elements: int, num_kept: int) -> bool:
    """Tell which coding a list of positions has: the shorter, and of equals the bitmap."""
    return packed_bytes(num_elements, 1) <= _elias_fano_bytes(num_elements, num_kept)


def index_bytes(num_elements: int, num_kept: int) -> int:
    """Return how many bytes a list of positions takes."""
    if num_kept == 0:
        return 0
    return min(packed_bytes(num_elements, 1), _elias_fano_bytes(num_elements, num_kept))


def pack_indices(indices_K: Tensor, num_elements: int) -> Tensor:
    """Write a list of positions.

    Shapes: indices_K [K] int64, increasing, below num_elements; returns [index_bytes(...)] uint8.
    """
    num_kept = indices_K.numel()
    if num_kept == 0:
        return torch.empty(0, dtype=torch.uint8, device=indices_K.device)
    if is_bitmap(num_elements, num_kept):
        return _pack_flags(indices_K, num_elements)
    low_bits, num_flags = _elias_fano(num_elements, num_kept)
    low_K = indices_K & ((1 << low_bits) - 1)
    low_K = low_K.to(torch.uint8) if low_bits <= 8 else low_K
    places_K = (indices_K >> low_bits).add_(torch.arange(num_kept, device=indices_K.device))
    return torch.cat([pack(low_K, low_bits), _pack_flags(places_K, num_flags)])


def unpack_indices(data_B: Tensor, num_elements: int, num_kept: int) -> Tensor:
    """Read a list of positions, trusting no byte of it.

    Shapes: data_B [index_bytes(num_elements, num_kept)] uint8; returns what an index may be: of a
    bitmap flags [num_elements] bool, which are smaller than the list; else [num_kept] int64.
    Raises: ValueError unless these are the bytes that `pack_indices` writes for `num_kept`
    increasing positions below `num_elements`.
    """
    device = data_B.device
    if num_kept == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    if is_bitmap(num_elements, num_kept):
        return _unpack_flags(data_B, num_elements, num_kept)
    low_bits, num_flags = _elias_fano(num_elements, num_kept)
    num_low_bytes = packed_bytes(num_kept, low_bits)
    check_padding(data_B[:num_low_bytes], num_kept, low_bits)
    indices_K = _places(_unpack_flags(data_B[num_low_bytes:], num_flags, num_kept))
    indices_K -= torch.arange(num_kept, device=device)
    indices_K <<= low_bits
    indices_K |= unpack(data_B[:num_low_bytes], num_kept, low_bits)
    if int(indices_K[-1]) >= num_elements:
        raise ValueError(f"position {int(indices_K[-1])} is not below {num_elements}")
    if num_kept > 1 and not bool((indices_K[1:] > indices_K[:-1]).all()):
        raise ValueError("positions are not increasing: two are equal or out of order")
    return indices_K


def check_padding(data_B: Tensor, num: int, width: int) -> None:
    """Raise ValueError unless the bits after the last of `num` packed values are zero."""
    used = num * (width % 8) % 8
    if used and int(data_B[-1]) >> used:
        raise ValueError("bits after the last value are not zero")


def _elias_fano_bytes(num_elements: int, num_kept: int) -> int:
    low_bits, num_flags = _elias_fano(num_elements, num_kept)
    return packed_bytes(num_kept, low_bits) + packed_bytes(num_flags, 1)


def _elias_fano(num_elements: int, num_kept: int) -> tuple[int, int]:
    """Return the number of low bits of a position and the length of the bitmap."""
    low_bits = (num_elements // num_kept).bit_length() - 1
    return low_bits, num_kept + ((num_elements - 1) >> low_bits)


def _pack_flags(places_K: Tensor, num: int) -> Tensor:
    flags = torch.zeros(num, dtype=torch.uint8, device=places_K.device)
    return pack(flags.index_fill_(0, places_K, 1), 1)


def _unpack_flags(data_B: Tensor, num: int, num_set: int) -> Tensor:
    check_padding(data_B, num, 1)
    flags = unpack(data_B, num, 1).view(torch.bool)
    num_found = int(flags.count_nonzero())
    if num_found != num_set:
        raise ValueError(f"{num_found} positions are marked, wanted {num_set}")
    return flags


def _places(flags: Tensor) -> Tensor:
    if flags.is_cuda:
        return flags.nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(flags.numpy()))


def _pack_narrow(codes: Bytes, width: int, out: Bytes) -> None:
    """Pack codes of 1 to 7 bits."""
    if width == 1:
        out[:] = np.packbits(codes, bitorder="little")
        return
    whole = len(codes) // 8 * 8
    for first in range(0, whole, _BLOCK):
        block = codes[first : min(first + _BLOCK, whole)]
        start = first * width // 8
        out[start : start + len(block) * width // 8] = _squeeze(block, width)
    if whole < len(codes):
        last = np.zeros(8, np.uint8)
        last[: len(codes) - whole] = codes[whole:]
        start = whole * width // 8
        out[start:] = _squeeze(last, width)[: len(out) - start]


def _unpack_narrow(data: Bytes, num: int, width: int) -> Bytes:
    """Unpack `num` codes of 0 to 7 bits."""
    if width == 0:
        return np.zeros(num, np.uint8)
    if width == 1:
        return np.unpackbits(data, count=num, bitorder="little")
    out = np.empty(num, np.uint8)
    whole = num // 8 * 8
    for first in range(0, whole, _BLOCK):
        last = min(first + _BLOCK, whole)
        out[first:last] = _spread(data[first * width // 8 : last * width // 8], width)
    if whole < num:
        rest = np.zeros(width, np.uint8)
        rest[: len(data) - whole * width // 8] = data[whole * width // 8 :]
        out[whole:] = _spread(rest, width)[: num - whole]
    return out


# Both ways go through neighbours: two codes of a 16-bit word meet in its low half, two pairs of a
# 32-bit word, two fours of a 64-bit word; and back.
_PAIRS: tuple[tuple[Any, int, int], ...] = (
    (np.uint16, 8, 1),
    (np.uint32, 16, 2),
    (np.uint64, 32, 4),
)


def _squeeze(codes: Bytes, width: int) -> Bytes:
    words: Any = codes
    for dtype, half, num in _PAIRS:
        words = words.view(dtype)
        low = dtype((1 << num * width) - 1)
        high = dtype(int(low) << half)
        words = (words & low) | ((words & high) >> dtype(half - num * width))
        if 2 * num * width == 8:
            narrow: Bytes = words.astype(np.uint8)
            return narrow
    packed: Bytes = words.view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)
    return packed


def _spread(data: Bytes, width: int) -> Bytes:
    words: Any
    if width in (2, 4):
        words = data.astype(np.uint32 if width == 2 else np.uint16)
    else:
        wide = np.zeros((len(data) // width, 8), np.uint8)
        wide[:, :width] = data.reshape(-1, width)
        words = wide.reshape(-1).view(np.uint64)
    for dtype, half, num in reversed(_PAIRS):
        if np.dtype(dtype).itemsize <= words.dtype.itemsize:
            words = words.view(dtype)
            low = dtype((1 << num * width) - 1)
            high = dtype(int(low) << num * width)
            words = (words & low) | ((words & high) << dtype(half - num * width))
    codes: Bytes = words.view(np.uint8)
    return codes
