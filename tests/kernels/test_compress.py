"""select and quantise against their references, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.kernels import compress

SIZES = [1, 7, 511, 513, 65_537, 140_000]
BUCKETS = [8, 100, 512, 70_000]


def vector(num, seed=0):
    """Return a vector with zeros, -0.0, a denormal and a wide range of magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, generator=generator) * 10 ** (
        3 * torch.randn(num, generator=generator).clamp(-3, 3)
    )
    x[::7] = 0.0
    x[3::11] = -0.0
    x[5::97] = 1e-42
    return x


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, 3e38, -3e38]), max_size=40),
    num_kept=st.integers(0, 40),
)
def test_of_equal_magnitudes_the_lowest_positions_are_kept(values, num_kept):
    num_kept = min(num_kept, len(values))
    order = sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))
    x = torch.tensor(values, dtype=torch.float32)
    for select in (compress.largest, compress.largest_ref):
        assert select(x, num_kept).tolist() == sorted(order[:num_kept])


@pytest.mark.parametrize("num", [140_000])
def test_the_sampled_threshold_never_changes_the_choice(num):
    generator = torch.Generator().manual_seed(num)
    normal = torch.randn(num, generator=generator)
    spikes = torch.zeros(num)
    spikes[torch.randperm(num, generator=generator)[:200]] = 1.0
    unseen = normal.clone()
    unseen[::2] *= 1e-3  # what the sample sees is small ...
    seen = normal * 1e-3
    seen[::2] *= 1e6  # ... or large
    for x in (normal, spikes, unseen, seen, torch.ones(num), torch.zeros(num), normal.round()):
        for num_kept in (1, 150, 201, num // 100, num // 2, num):
            found = compress.largest(x, num_kept)
            assert torch.equal(found, compress.largest_ref(x, num_kept))


@pytest.mark.parametrize("num", SIZES)
def test_dithering_is_the_references(num):
    x = vector(num)
    for bucket in BUCKETS:
        for measure in (compress.bucket_max, compress.bucket_norm):
            scales = measure(x, bucket)
            for levels in (0.5, 7):
                codes = compress.dither(x, scales, bucket, levels, 5)
                assert torch.equal(codes, compress.dither_ref(x, scales, bucket, levels, 5))
                assert int(codes.max()) <= 2 * levels
                values = compress.undither(codes, scales, bucket, levels)
                assert torch.equal(values, compress.undither_ref(codes, scales, bucket, levels))


@pytest.mark.parametrize("num", SIZES)
def test_powers_of_two_are_the_references(num):
    x = vector(num)
    exponents, signs = compress.round_to_powers(x, 4)
    wanted = compress.round_to_powers_ref(x, 4)
    assert torch.equal(exponents, wanted[0])
    assert torch.equal(signs, wanted[1])
    assert torch.equal(compress.powers(exponents, signs), compress.powers_ref(exponents, signs))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e20, 3e38])
def test_scales_neither_overflow_nor_vanish(scale):
    x = (torch.rand(3001, generator=torch.Generator().manual_seed(0)) - 0.5) * scale
    for bucket in (7, 512, 1000, 3001):
        parts = x.double().split(bucket)
        for measure, truth in (
            (compress.bucket_max, lambda part: part.abs().max()),
            (compress.bucket_norm, lambda part: part.square().sum().sqrt()),
            (compress.bucket_mean, lambda part: part.abs().mean()),
        ):
            wanted = torch.stack([truth(part) for part in parts]).float()
            torch.testing.assert_close(measure(x, bucket), wanted, rtol=1e-6, atol=3e-45)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40
    ),
    bucket=st.integers(1, 50),
)
def test_no_scale_is_below_an_entry_of_its_bucket(values, bucket):
    x = torch.tensor(values, dtype=torch.float32)
    for measure in (compress.bucket_max, compress.bucket_norm):
        for scale, part in zip(measure(x, bucket), x.split(bucket), strict=True):
            assert float(scale) >= float(part.abs().max())
