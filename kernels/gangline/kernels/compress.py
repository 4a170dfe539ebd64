"""Select, quantise and restore vectors: the arithmetic of the gradient compressors.

On the CPU numpy does the work, on views that share memory, in blocks that stay in the cache: a pass
over a block there costs a fifth of one over memory. On CUDA the plain torch form runs. Both give
the same bits, roundings by chance included (noise.py). No input may have NaN or infinities.

N = elements, K = kept elements, G = buckets of B elements, the last one maybe shorter
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gangline.kernels.noise import BLOCK, NoiseBlocks, noise_ref

# Elements that are summed in fp32.
_PIECE = 512
# Elements of the sample from which `largest` guesses its threshold.
_SAMPLE = 1 << 16
_SMALLEST = 2.0**-149
# Random bits of one decision; the fraction of a value is cut to as many.
_FRACTION_BITS = 23

Floats = NDArray[np.float32]


def largest_ref(x_N: Tensor, num_kept: int) -> Tensor:
    """Return the positions of the largest magnitudes, in plain torch; the truth for `largest`."""
    order = x_N.abs().argsort(descending=True, stable=True)
    return order[:num_kept].sort().values


def largest(x_N: Tensor, num_kept: int) -> Tensor:
    """Return the positions of the `num_kept` largest magnitudes; of equal ones, the lowest.

    A sample gives a threshold that a little more than num_kept elements pass; the exact one is
    found among those. 1 % of 25 million: 16 ms on one core, where torch.topk takes 480 and leaves
    ties to chance. A vector on which the sample misleads (of which most elements are equal, say)
    costs 10 to 20 times as much.

    Shapes: x_N [N] fp32; returns [num_kept] int64, increasing.
    """
    if x_N.is_cuda:
        return largest_ref(x_N, num_kept)
    x = x_N.contiguous().numpy()
    if num_kept >= len(x):
        return torch.arange(len(x))
    if num_kept == 0:
        return torch.empty(0, dtype=torch.int64)
    # Where most elements are zero (gradients of embeddings), those that are not.
    guess = max(_guess_threshold(x, num_kept), _SMALLEST)
    places, values = _at_least(x, guess, limit=4 * num_kept + BLOCK)
    if num_kept <= len(places):
        return torch.from_numpy(places[_keep_largest(values, num_kept)])
    if guess == _SMALLEST and len(places):
        # The zeros that are missing lie below num_kept, wherever the others are.
        zeros = np.flatnonzero(x[:num_kept] == 0)[: num_kept - len(places)]
        return torch.from_numpy(np.sort(np.concatenate([places, zeros])))
    return torch.from_numpy(_keep_largest(np.abs(x), num_kept))


def bucket_max(x_N: Tensor, bucket: int) -> Tensor:
    """Return the largest magnitude of each bucket.

    Shapes: x_N [N] fp32; returns [G] fp32.
    """
    # Two passes that vectorise; abs().amax(1) takes eight times as long on the CPU.
    return _per_bucket(x_N, bucket, lambda x_GB: torch.maximum(x_GB.amax(1), -x_GB.amin(1)))


def bucket_norm(x_N: Tensor, bucket: int) -> Tensor:
    """Return the Euclidean norm of each bucket, rounded, but not below its largest magnitude.

    Shapes: x_N [N] fp32; returns [G] fp32.
    """
    norms_G = _per_bucket(x_N, bucket, lambda x_GB: _row_norms(x_GB, 2)).float()
    return torch.maximum(norms_G, bucket_max(x_N, bucket))


def bucket_mean(x_N: Tensor, bucket: int) -> Tensor:
    """Return the mean magnitude of each bucket, rounded.

    Shapes: x_N [N] fp32; returns [G] fp32.
    """
    sums_G = _per_bucket(x_N, bucket, lambda x_GB: _row_norms(x_GB, 1))
    sizes_G = torch.full_like(sums_G, bucket)
    if x_N.numel() % bucket:
        sizes_G[-1] = x_N.numel() % bucket
    return (sums_G / sizes_G).float()


def dither_ref(x_N: Tensor, scales_G: Tensor, bucket: int, levels: float, seed: int) -> Tensor:
    """Quantise in plain torch; the truth for `dither`."""
    scale_N = scales_G.repeat_interleave(bucket)[: x_N.numel()]
    ratio_N = x_N / torch.where(scale_N > 0, scale_N, 1.0)
    fixed_N = (ratio_N * (levels * 2.0**_FRACTION_BITS)).to(torch.int32).to(torch.int64)
    noise_N = noise_ref(0, x_N.numel(), seed, x_N.device) >> (32 - _FRACTION_BITS)
    shifted_N = fixed_N + int(levels * 2**_FRACTION_BITS) + noise_N
    return (shifted_N >> _FRACTION_BITS).to(torch.uint8)


def dither(x_N: Tensor, scales_G: Tensor, bucket: int, levels: float, seed: int) -> Tensor:
    """Round each element's x / scale * levels to a whole number, up or down by chance.

    The code is floor(x / scale * levels + levels + u) with u uniform in [0, 1): up with the
    probability of the fraction, so the mean is x / scale * levels + levels, less at most 2**-23.
    The product is cut to fixed point first, so that adding u rounds nothing.

    Shapes: x_N [N] fp32; scales_G [G] fp32, none below a magnitude of its bucket; returns [N] uint8
    in [0, 2 levels]. levels: 0.5, 1 to 127.
    """
    if x_N.is_cuda:
        return dither_ref(x_N, scales_G, bucket, levels, seed)
    x, codes = x_N.contiguous().numpy(), np.empty(x_N.numel(), np.uint8)
    scales = torch.where(scales_G > 0, scales_G, 1.0).numpy()
    factor, offset = np.float32(levels * 2.0**_FRACTION_BITS), np.uint32(levels * 2**_FRACTION_BITS)
    longest = min(len(x), BLOCK)
    source, ratio = NoiseBlocks(seed, longest), np.empty(longest, np.float32)
    fixed = np.empty(longest, np.int32)
    for place, shape, groups in _blocks(len(x), bucket):
        size = place.stop - place.start
        ratio_b, fixed_b = ratio[:size], fixed[:size]
        np.divide(x[place].reshape(shape), scales[groups, None], out=ratio_b.reshape(shape))
        np.multiply(ratio_b, factor, out=ratio_b)
        np.copyto(fixed_b, ratio_b, casting="unsafe")
        words = source.block(place.start, size)
        np.right_shift(words, 32 - _FRACTION_BITS, out=words)
        np.add(words, offset, out=words)
        np.add(words, fixed_b.view(np.uint32), out=words)
        np.right_shift(words, _FRACTION_BITS, out=words)
        np.copyto(codes[place], words, casting="unsafe")
    return torch.from_numpy(codes)


def undither_ref(codes_N: Tensor, scales_G: Tensor, bucket: int, levels: float) -> Tensor:
    """Restore quantised values in plain torch; the truth for `undither`."""
    scale_N = scales_G.repeat_interleave(bucket)[: codes_N.numel()]
    return (codes_N.float() - levels) / levels * scale_N


def undither(codes_N: Tensor, scales_G: Tensor, bucket: int, levels: float) -> Tensor:
    """Return (code - levels) / levels * scale: each step rounded once, so alike everywhere.

    No result is above its scale. Shapes: codes_N [N] uint8; scales_G [G] fp32; returns [N] fp32.
    """
    if codes_N.is_cuda:
        return undither_ref(codes_N, scales_G, bucket, levels)
    codes, scales = codes_N.contiguous().numpy(), scales_G.contiguous().numpy()
    out = np.empty(len(codes), np.float32)
    for place, shape, groups in _blocks(len(out), bucket):
        block = out[place]
        np.subtract(codes[place], np.float32(levels), out=block, dtype=np.float32)
        if levels != 1:
            np.divide(block, np.float32(levels), out=block)
        block_GB = block.reshape(shape)
        np.multiply(block_GB, scales[groups, None], out=block_GB)
    return torch.from_numpy(out)


def round_to_powers_ref(x_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Round to powers of two in plain torch; the truth for `round_to_powers`."""
    bits_N = x_N.view(torch.int32).to(torch.int64)
    noise_N = noise_ref(0, x_N.numel(), seed, x_N.device) >> 9
    exponents_N = ((bits_N & 0x7FFFFFFF) + noise_N) >> 23
    return exponents_N.to(torch.uint8), (bits_N < 0).to(torch.uint8)


def round_to_powers(x_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Round each magnitude to a power of two, up or down by chance, with x as the mean.

    A float 2**e (1 + f / 2**23) has the bits e, f. A uniform 23-bit number added to f carries into
    e with probability f / 2**23, which is what the mean asks for: exact, without a floating-point
    operation. Denormals become 0 or 2**-126, by the same rule.

    Shapes: x_N [N] fp32, magnitudes up to 2**127; returns the exponents' bits and the signs, both
    [N] uint8.
    """
    if x_N.is_cuda:
        return round_to_powers_ref(x_N, seed)
    bits, num = x_N.contiguous().numpy().view(np.uint32), x_N.numel()
    exponents, signs = np.empty(num, np.uint8), np.empty(num, np.uint8)
    longest = min(num, BLOCK)
    source, scratch = NoiseBlocks(seed, longest), np.empty(longest, np.uint32)
    for start in range(0, num, BLOCK):
        block = bits[start : start + BLOCK]
        words, work = source.block(start, len(block)), scratch[: len(block)]
        np.right_shift(block, 31, out=work)
        np.copyto(signs[start : start + BLOCK], work, casting="unsafe")
        np.right_shift(words, 9, out=words)
        np.bitwise_and(block, 0x7FFFFFFF, out=work)
        np.add(words, work, out=words)
        np.right_shift(words, 23, out=words)
        np.copyto(exponents[start : start + BLOCK], words, casting="unsafe")
    return torch.from_numpy(exponents), torch.from_numpy(signs)


def powers_ref(exponents_N: Tensor, signs_N: Tensor) -> Tensor:
    """Return powers of two in plain torch; the truth for `powers`."""
    bits_N = (exponents_N.to(torch.int64) << 23) - (signs_N.to(torch.int64) << 31)
    return bits_N.to(torch.int32).view(torch.float32)


def powers(exponents_N: Tensor, signs_N: Tensor) -> Tensor:
    """Return the powers of two with these exponents' bits and signs; exponent 0 is zero.

    Shapes: both [N] uint8; returns [N] fp32.
    """
    if exponents_N.is_cuda:
        return powers_ref(exponents_N, signs_N)
    exponents, signs = exponents_N.contiguous().numpy(), signs_N.contiguous().numpy()
    bits, scratch = (
        np.empty(len(exponents), np.uint32),
        np.empty(min(len(exponents), BLOCK), np.uint32),
    )
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK]
        work = scratch[: len(block)]
        np.copyto(block, exponents[start : start + BLOCK])
        np.left_shift(block, 23, out=block)
        np.copyto(work, signs[start : start + BLOCK])
        np.bitwise_or(block, np.left_shift(work, 31, out=work), out=block)
    return torch.from_numpy(bits.view(np.float32))


def _guess_threshold(x: Floats, num_kept: int) -> float:
    """Return a magnitude that most probably a little more than num_kept elements reach, or 0."""
    sample = np.abs(x[:: max(len(x) // _SAMPLE, 1)])
    wanted = num_kept * len(sample) / len(x)
    rank = int(wanted + 4 * wanted**0.5 + 8)
    if rank >= len(sample):
        return 0.0
    return float(np.partition(sample, len(sample) - rank)[len(sample) - rank])


def _at_least(x: Floats, threshold: float, *, limit: int) -> tuple[NDArray[np.int64], Floats]:
    """List the elements that reach a threshold, with their magnitudes; none if above `limit`."""
    longest = min(len(x), BLOCK)
    magnitudes, passes = np.empty(longest, np.float32), np.empty(longest, np.bool_)
    places, values, num_found = [], [], 0
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK]
        sizes, flags = magnitudes[: len(block)], passes[: len(block)]
        np.greater_equal(np.abs(block, out=sizes), np.float32(threshold), out=flags)
        found = np.flatnonzero(flags)
        places.append(found + start)
        values.append(sizes[found])
        num_found += len(found)
        if num_found > limit:
            return np.empty(0, np.int64), np.empty(0, np.float32)
    return np.concatenate(places), np.concatenate(values)


def _keep_largest(magnitudes: Floats, num_kept: int) -> NDArray[np.int64]:
    """Return where the num_kept largest are, in order; of equal ones, the first."""
    last = np.partition(magnitudes, len(magnitudes) - num_kept)[len(magnitudes) - num_kept]
    above = magnitudes > last
    num_ties = num_kept - int(np.count_nonzero(above))
    above[np.flatnonzero(magnitudes == last)[:num_ties]] = True
    return np.flatnonzero(above)


def _row_norms(x_GB: Tensor, order: int) -> Tensor:
    """Return the 1- or 2-norm of each row in fp64.

    Short pieces are summed in fp32, 25 times as fast; where that overflows, or where squares may
    vanish, the row is done again in fp64.
    """
    num_whole = x_GB.shape[1] // _PIECE * _PIECE
    pieces = [x_GB[:, :num_whole].unflatten(1, (-1, _PIECE)), x_GB[:, None, num_whole:]]
    norms = [torch.linalg.vector_norm(piece, order, dim=2) for piece in pieces]
    pieces_GP = torch.cat(norms, 1)
    norms_G: Tensor = torch.linalg.vector_norm(pieces_GP, order, dim=1, dtype=torch.float64)
    doubtful_G = (norms_G < 1e-12) | ~(norms_G < 1e16)
    if order == 2 or not bool(norms_G.isfinite().all()):
        rows = doubtful_G.nonzero().flatten()
        if rows.numel():
            norms_G[rows] = torch.linalg.vector_norm(x_GB[rows], order, dim=1, dtype=torch.float64)
    return norms_G


def _per_bucket(x_N: Tensor, bucket: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a reduction of rows to full buckets and to the last, shorter one."""
    whole = x_N.numel() // bucket * bucket
    parts = [reduce(x_N[:whole].view(-1, bucket))] if whole else []
    if whole < x_N.numel():
        parts.append(reduce(x_N[whole:].view(1, -1)))
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _blocks(num: int, bucket: int) -> Iterator[tuple[slice, tuple[int, int], slice]]:
    """Cut [0, num) into blocks: the place, its shape as (buckets, elements), and which buckets."""
    whole = num // bucket * bucket
    if bucket <= BLOCK:
        step = BLOCK // bucket * bucket
        for first in range(0, whole, step):
            last = min(first + step, whole)
            buckets = slice(first // bucket, last // bucket)
            yield slice(first, last), ((last - first) // bucket, bucket), buckets
        if whole < num:
            yield slice(whole, num), (1, num - whole), slice(whole // bucket, whole // bucket + 1)
        return
    for start in range(0, num, bucket):
        end = min(start + bucket, num)
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            here = slice(start // bucket, start // bucket + 1)
            yield slice(first, last), (1, last - first), here
