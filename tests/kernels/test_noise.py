"""Random numbers and subsets: the references, the repeatability, the evenness."""

import math

import pytest
import torch

from gangline.kernels import noise


@pytest.mark.parametrize(("first", "num"), [(0, 0), (0, 1), (5, 70_000), (2**31, 10)])
def test_numbers_are_the_references(first, num):
    for seed in (0, 1, 2**64 - 1):
        numbers = noise.noise(first, num, seed)
        assert torch.equal(numbers, noise.noise_ref(first, num, seed))
        assert bool(((numbers >= 0) & (numbers < 2**32)).all())


def test_numbers_are_the_same_on_every_platform():
    # Integer arithmetic: these may never change, or receivers draw other positions than senders.
    assert noise.noise(0, 4, 0).tolist() == [2872864583, 481299086, 1195131715, 2098345165]
    assert noise.derive_seed(1, 2, 3) == 15020427595393229491
    assert noise.derive_seed(1, 2) != noise.derive_seed(2, 1)
    kept = noise.random_subset(50, 5, 7).nonzero().flatten().tolist()
    assert kept == [12, 21, 27, 42, 45]


def test_numbers_are_even_in_each_bit_and_unrelated_between_seeds():
    num, seeds = 50_000, [1, 2, 3, 2**63]
    rows = torch.stack([noise.noise(0, num, seed) for seed in seeds])
    bits = (rows[:, :, None] >> torch.arange(32)) & 1
    # 4 x 32 counts and 6 x 32 agreements of fair coins; beyond 6 deviations once in 500 million.
    assert float((bits.sum(1) - num / 2).abs().max()) < 6 * math.sqrt(num) / 2
    for i in range(len(seeds)):
        for j in range(i):
            agree = (bits[i] == bits[j]).sum(0)
            assert float((agree - num / 2).abs().max()) < 6 * math.sqrt(num) / 2


@pytest.mark.parametrize("num", [1, 2, 7, 50, 400])
def test_a_subset_is_the_references(num):
    for num_kept in {0, 1, num // 3, num // 2, num - 1, num}:
        flags = noise.random_subset(num, num_kept, 3)
        assert torch.equal(flags, noise.random_subset_ref(num, num_kept, 3))
        assert int(flags.sum()) == num_kept


def test_a_long_subset_is_drawn_in_parts_and_stays_the_references():
    # More than one part: 150,000 draws of at most 65,536.
    flags = noise.random_subset(400_000, 150_000, 1)
    assert int(flags.sum()) == 150_000
    assert torch.equal(flags, noise.random_subset(400_000, 150_000, 1))


@pytest.mark.parametrize(("num", "num_kept"), [(10, 3), (10, 8), (7, 1)])
def test_every_position_and_pair_is_as_likely(num, num_kept):
    num_draws = 1000
    flags = torch.stack([noise.random_subset(num, num_kept, seed) for seed in range(num_draws)])
    together = flags.double().T @ flags.double()
    single, pair = num_kept / num, num_kept * (num_kept - 1) / (num * (num - 1))
    for i in range(num):
        for j in range(i + 1):
            p = single if i == j else pair
            # Beyond 5 deviations once in two million, for 55 counts.
            assert abs(float(together[i, j]) - num_draws * p) <= 5 * math.sqrt(
                num_draws * p * (1 - p)
            )
