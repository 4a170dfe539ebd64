"""Order of the training samples: a pseudo-random permutation per epoch, computed and never stored.

A stream position p lies in epoch p // n at index p % n, n being the number of samples. The sample
at (epoch, index) depends on (seed, epoch, index) and n alone. No world size goes in, so a run that
loses or gains workers in mid-epoch goes on with the very samples that it would have taken.

The permutation is an alternating Feistel network over Z_a x Z_b with a = ceil(sqrt(n)) and
b = ceil(n / a), walked until it falls below n. As a * b - n < a, fewer than one index in sqrt(n)
walks twice. Rounds alternate left += F(right) mod a and right += F(left) mod b; F is SplitMix64's
finalizer of its argument plus the round's key, reduced by a 32-bit multiply-shift.

Source: J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 4 and 5
(cycle walking, generalised Feistel; they use one modulus layout and a block cipher for F, we use
two moduli and a mixing function, since nobody attacks a sample order); G. Steele, D. Lea, C. Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014 (the finalizer).
"""

import hashlib
from math import isqrt

import numpy as np
from numpy.typing import NDArray

# Small n need the rounds. Relation of neighbours at n = 6, in standard deviations over 200,000
# epochs: 280 with 12 rounds, 20 with 16, up to 3 with 20, nothing with 24.
NUM_ROUNDS = 24
MAX_SAMPLES = 2**62

Words = NDArray[np.uint64]


def sample_ids(cursor: int, count: int, *, num_samples: int, seed: int) -> NDArray[np.int64]:
    """Give the sample ids of stream positions [cursor, cursor + count).

    Shapes: [count] int64, each in [0, num_samples).
    Raises: ValueError for a negative cursor or count, or num_samples outside [1, 2**62].
    Guarantees: each run of num_samples positions that starts at a multiple of num_samples holds
        every id exactly once. Memory and time grow with count, not with num_samples.
    """
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples is {num_samples}; wanted 1 to 2**62")
    if cursor < 0 or count < 0:
        raise ValueError(f"cursor is {cursor} and count is {count}; neither may be negative")
    if count == 0:
        return np.empty(0, dtype=np.int64)
    # Python integers here: a cursor past 2**63 still has an epoch and an index that fit.
    first_epoch, first_index = divmod(cursor, num_samples)
    last_epoch = (cursor + count - 1) // num_samples
    offsets = np.arange(count, dtype=np.uint64) + np.uint64(first_index)
    epochs = (offsets // np.uint64(num_samples)).astype(np.int64)
    keys = np.stack([_round_keys(seed, epoch) for epoch in range(first_epoch, last_epoch + 1)])
    return _permute(offsets % np.uint64(num_samples), num_samples, keys, epochs)


def share_of_batch(cursor: int, batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Give this rank's stream positions [first, last) of the batch that starts at `cursor`.

    Raises: ValueError for a rank outside the world or a negative size.
    Guarantees: the shares of ranks 0, 1, ... follow each other without gap or overlap and make up
        [cursor, cursor + batch_size); their sizes differ by at most one, larger ones first. With
        fewer samples than ranks the last shares are empty.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    if cursor < 0 or batch_size < 0:
        raise ValueError(f"cursor is {cursor} and batch_size is {batch_size}; wanted 0 or more")
    size, extra = divmod(batch_size, world_size)
    first = cursor + rank * size + min(rank, extra)
    return first, first + size + (rank < extra)


def _round_keys(seed: int, epoch: int) -> Words:
    stream = hashlib.shake_256(f"gangline sample order 1:{seed}:{epoch}".encode())
    digest = stream.digest(8 * NUM_ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _permute(
    indices: Words, num_samples: int, keys: Words, key_rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Map each index to its sample id under the key row that belongs to it.

    Shapes: indices [N], keys [epochs, NUM_ROUNDS], key_rows [N] -> [N] int64.
    """
    num_left = isqrt(num_samples - 1) + 1
    num_right = -(-num_samples // num_left)
    result = _feistel(indices, num_left, num_right, keys, key_rows)
    outside = np.flatnonzero(result >= num_samples)
    while outside.size:
        walked = _feistel(result[outside], num_left, num_right, keys, key_rows[outside])
        result[outside] = walked
        outside = outside[walked >= num_samples]
    return result.astype(np.int64)


def _feistel(
    values: Words, num_left: int, num_right: int, keys: Words, key_rows: NDArray[np.int64]
) -> Words:
    """Permute [0, num_left * num_right)."""
    a, b = np.uint64(num_left), np.uint64(num_right)
    right, left = np.divmod(values, a)
    for number in range(NUM_ROUNDS):
        key = keys[key_rows, number]
        if number % 2 == 0:
            left = _add_below(left, _mix(right + key), a)
        else:
            right = _add_below(right, _mix(left + key), b)
    return right * a + left


def _add_below(values: Words, mixed: Words, modulus: np.uint64) -> Words:
    # (high 32 bits * modulus) >> 32 is uniform in [0, modulus) and far cheaper than a division.
    half = np.uint64(32)
    total = values + (((mixed >> half) * modulus) >> half)
    np.subtract(total, modulus, out=total, where=total >= modulus)
    return total


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
