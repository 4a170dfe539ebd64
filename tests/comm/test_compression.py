"""The laws of the compressors: class, constant, length, what becomes of odd inputs."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.comm.compression import (
    CompressionError,
    NonFiniteError,
    NonFinitePayloadError,
    PayloadError,
)
from gangline.comm.compressors import (
    Dithering,
    Identity,
    Natural,
    RandK,
    Shrunk,
    Sign,
    TopK,
    contractive,
)

from .compressor_cases import ALL, CONTRACTIVE, SHRUNK, UNBIASED, vectors, worst_for_dithering

SIZE = 64
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def squared_error(compressor, x, seed=0):
    """Return ||C(x) - x||^2 / ||x||^2."""
    decoded = compressor.decompress(compressor.compress(x, seed=seed), x.numel()).double()
    return float((decoded - x.double()).square().sum() / x.double().square().sum())


def draws(compressor, x, num_draws):
    """Return independent results for x, as rows.

    Entrywise compressors get x many times over in one vector, each with its own random numbers.
    """
    copies = 1 if isinstance(compressor, RandK) else 100
    rows = []
    for seed in range(num_draws // copies):
        tiled = x.repeat(copies)
        decoded = compressor.decompress(compressor.compress(tiled, seed=seed), tiled.numel())
        rows.append(decoded.view(copies, -1))
    return torch.cat(rows).double()


def neighbours(compressor, x):
    """Return the two values that an unbiased compressor may make of each entry."""
    x = x.double()
    if isinstance(compressor, RandK):
        return torch.zeros_like(x), x / compressor.parameter(len(x)) * len(x)
    if isinstance(compressor, Natural):
        low = x.sign() * 2.0 ** x.abs().log2().floor()
        return low, 2 * low
    if isinstance(compressor, Dithering):
        parts = x.split(compressor.bucket_size)
        order = math.inf if compressor.norm == "max" else 2
        scale = torch.cat([part.norm(order).expand(len(part)) for part in parts])
        step = scale / compressor.levels
        low = ((x / step + compressor.levels).floor() - compressor.levels) * step
        return low, low + step
    return x, x


def evidence_of_bias(compressor, x, num_draws):
    """Return the largest R KL(found, p) of all entries: p = how often the upper value is due.

    By Chernoff's bound it exceeds e with a probability of at most 2 exp(-e), for any p and R, also
    where the upper value is rare and a normal approximation is wrong.
    """
    low, high = neighbours(compressor, x)
    found = draws(compressor, x, num_draws)
    is_high = (found - high).abs() < (found - low).abs()
    value = torch.where(is_high, high, low)
    rounding = 1e-6 * x.double().abs().max()
    assert float((found - value).abs().max()) <= rounding, "neither of the two values"
    p = ((x.double() - low) / (high - low)).nan_to_num(0.0).clamp(0, 1)
    rate = is_high.double().mean(0)
    kl = torch.special.xlogy(rate, rate / p) + torch.special.xlogy(1 - rate, (1 - rate) / (1 - p))
    # Where p is 0 or 1 by the formula, floats may be off by the rounding of the ratio.
    return float(num_draws * kl[(p > 1e-6) & (p < 1 - 1e-6)].amax() if len(x) else 0.0)


# Of sound compressors, one of the 12 x 4 x 64 entries below exceeds this with a probability of at
# most 3072 * 2 * exp(-23) = 6e-7. (The seeds are fixed, so it never does later.)
MOST_EVIDENCE = 23.0


@pytest.mark.parametrize("compressor", UNBIASED[1:], ids=repr)
def test_the_mean_of_an_unbiased_compressor_is_the_vector(compressor):
    for name in ("normal", "heavy tails", "worst for 2 bits", "spread"):
        num_draws = 300 if isinstance(compressor, RandK) else 4000
        evidence = evidence_of_bias(compressor, vectors(SIZE)[name], num_draws)
        assert evidence < MOST_EVIDENCE, name


def test_the_test_of_the_mean_sees_one_in_ten_rounded_wrongly():
    class Leaning(Dithering):
        def encode(self, x_N, seed):
            high_N, scale = neighbours(self, x_N)[1].float(), x_N.abs().max()
            return super().encode((x_N + 0.1 * (high_N - x_N)).clamp(-scale, scale), seed)

    x = vectors(SIZE)["normal"]
    assert evidence_of_bias(Leaning(4, SIZE), x, 4000) > MOST_EVIDENCE


@pytest.mark.parametrize("compressor", UNBIASED, ids=repr)
def test_omega_bounds_the_mean_error_of_an_unbiased_compressor(compressor):
    num_draws = 80 if isinstance(compressor, RandK) else 400
    # Entrywise ones see the vector many times over in one, so that buckets of 512 are full.
    omega = compressor.constant(SIZE if isinstance(compressor, RandK) else 100 * SIZE)
    for name, x in vectors(SIZE).items():
        found = draws(compressor, x, num_draws)
        errors = (found - x.double()).square().sum(1) / x.double().square().sum()
        margin = 5 * float(errors.std()) / math.sqrt(num_draws)
        assert float(errors.mean()) <= omega + margin + 1e-6, name


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_the_bound_of_dithering_is_reached(bits):
    compressor = Dithering(bits, SIZE)
    x = worst_for_dithering(SIZE, compressor.levels) if bits > 1 else vectors(SIZE)["one entry"]
    errors = (draws(compressor, x, 4000) - x.double()).square().sum(1) / x.double().square().sum()
    margin = 5 * float(errors.std()) / math.sqrt(4000)
    assert float(errors.mean()) == pytest.approx(compressor.constant(SIZE), abs=margin + 1e-6)


def test_natural_reaches_an_eighth():
    x = torch.full((SIZE,), 4 / 3)
    errors = (draws(Natural(), x, 4000) - x.double()).square().sum(1) / x.double().square().sum()
    assert float(errors.mean()) == pytest.approx(1 / 8, rel=0.01)


def test_the_maximum_as_scale_costs_less_than_the_norm_and_is_bounded_by_less():
    x = torch.randn(512 * 100, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        by_max, by_norm = Dithering(bits, 512), Dithering(bits, 512, "l2")
        assert by_max.constant(512) < by_norm.constant(512)
        assert squared_error(by_max, x) < squared_error(by_norm, x) / 8


@pytest.mark.parametrize("compressor", CONTRACTIVE, ids=repr)
@settings(max_examples=60, deadline=None)
@given(values=st.lists(finite, min_size=1, max_size=200))
def test_a_contractive_compressor_contracts_every_vector(compressor, values):
    x = torch.tensor(values, dtype=torch.float32)
    norm = float(x.double().norm())
    if norm < 1e-30:
        return  # scales of Sign round to denormals
    delta = compressor.constant(x.numel())
    assert squared_error(compressor, x) <= (1 - delta) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("compressor", SHRUNK, ids=repr)
def test_a_shrunk_compressor_contracts_in_the_mean(compressor):
    for name, x in vectors(SIZE).items():
        found = [squared_error(compressor, x, seed) for seed in range(30)]
        margin = 5 * statistics.stdev(found) / math.sqrt(30)
        assert statistics.mean(found) <= 1 - compressor.constant(SIZE) + margin + 1e-6, name


def test_the_constants_are_those_of_the_formulas():
    assert TopK(0.01).constant(1000) == 0.01
    assert RandK(0.01).constant(1000) == 99
    # min(B / s^2, sqrt(B) / s) with s = 7
    assert Dithering(4, 512, "l2").constant(10**6) == pytest.approx(math.sqrt(512) / 7)
    assert Dithering(8, 512, "l2").constant(10**6) == pytest.approx(512 / 127**2)
    assert Dithering(4, 512, "l2").constant(100) == pytest.approx(math.sqrt(100) / 7)
    assert Dithering(1, 512).constant(10**6) == 511
    assert Natural().constant(5) == 1 / 8
    assert Sign(64).constant(1000) == 1 / 64
    assert Sign().constant(1000) == 1 / 1000
    assert contractive(RandK(0.01)).constant(1000) == pytest.approx(0.01)
    assert contractive(TopK(0.01)) == TopK(0.01)
    with pytest.raises(ValueError, match="contractive already"):
        Shrunk(TopK(0.5))


@settings(max_examples=150, deadline=None)
@given(
    num=st.integers(1, 3000),
    percent=st.integers(1, 10_000),
    bits=st.integers(1, 8),
    size=st.integers(1, 700),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_payload_has_the_length_that_the_formula_says(num, percent, bits, size, seed):
    def up(bit_count):
        return -(-bit_count // 8)

    fraction = percent / 10_000
    kept = -(-num * percent // 10_000)
    low = (num // kept).bit_length() - 1
    positions = min(up(num), up(kept * low) + up(kept + ((num - 1) >> low)))
    wanted = {
        Identity(): 4 * num,
        TopK(fraction): 4 * kept + positions,
        RandK(fraction): 8 + 4 * kept,
        Dithering(bits, size): 4 * -(-num // size) + up(num * bits),
        Natural(): num + up(num),
        Sign(size): 4 * -(-num // size) + up(num),
        Sign(): 4 + up(num),
    }
    x = torch.randn(num, generator=torch.Generator().manual_seed(num))
    for compressor, length in wanted.items():
        for variant in (compressor, contractive(compressor)):
            payload = variant.compress(x, seed=seed)
            assert payload.dtype is torch.uint8
            assert payload.numel() == variant.payload_bytes(num) == 16 + length


def test_the_fraction_is_taken_as_it_is_written():
    for num, fraction, kept in ((100, 0.07, 7), (1000, 0.029, 29), (10, 0.3, 3), (3, 0.34, 2)):
        assert TopK(fraction).parameter(num) == kept
    assert TopK(1e-9).parameter(5) == 1


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(compressor):
    x = vectors(300)["normal"]
    payload = compressor.compress(x, seed=7)
    assert torch.equal(payload, compressor.compress(x.clone(), seed=7))
    assert torch.equal(payload, compressor.compress(torch.stack([x, x]).T[:, 0], seed=7))
    draws_by_chance = repr(compressor).find("RandK") + repr(compressor).find("Dith") > -2
    if draws_by_chance or "Natural" in repr(compressor):
        assert not torch.equal(payload, compressor.compress(x, seed=8))


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_every_finite_vector_comes_back_in_its_shape(compressor):
    assert compressor.payload_bytes(0) == 16
    assert compressor.decompress(compressor.compress(torch.empty(0)), 0).numel() == 0
    for x in (
        torch.zeros(1),
        torch.tensor([2.0]),
        torch.zeros(1000),
        torch.tensor([0.0, -0.0, 1.0, -1.0]),
        torch.full((9,), 1e-45),
        torch.tensor([1e-45, 1.0, -1e-40]),
        torch.full((600,), 2.0**100),
        torch.ones(513),
    ):
        decoded = compressor.decompress(compressor.compress(x, seed=1), x.numel())
        assert decoded.dtype is torch.float32
        assert decoded.shape == x.shape
        assert bool(decoded.isfinite().all())
        if not bool(x.any()):
            assert not bool(decoded.any()), "zeros must stay zeros"


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_adding_up_is_decoding_and_adding(compressor):
    x = vectors(300)["normal"]
    payload, before = compressor.compress(x, seed=3), torch.full((300,), 0.5)
    decoded = compressor.decompress(payload, 300)
    for sign in (1, -1):
        found = before.clone()
        compressor.accumulate(found, payload, sign=sign)
        assert torch.equal(found, before + sign * decoded)


def test_kept_entries_keep_every_bit():
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.4e38, -1.5])
    for compressor in (Identity(), TopK(1.0)):
        decoded = compressor.decompress(compressor.compress(x), 6)
        assert torch.equal(decoded.view(torch.int32), x.view(torch.int32))
    some = TopK(0.5).decompress(TopK(0.5).compress(x), 6)
    assert some.tolist() == [0, 0, 0, x[3], x[4], -1.5]
    ties = TopK(0.5).decompress(TopK(0.5).compress(torch.tensor([1.0, -2, 2, -2, 1, 2])), 6)
    assert ties.tolist() == [0, -2, 2, -2, 0, 0]


def test_denormals_keep_their_mean_under_natural_rounding():
    x = torch.full((200_000,), 3e-39)
    decoded = Natural().decompress(Natural().compress(x, seed=1), x.numel())
    assert set(decoded.tolist()) == {0.0, 2.0**-126}
    assert float(decoded.double().mean()) == pytest.approx(3e-39, rel=0.02)


@pytest.mark.parametrize("compressor", ALL, ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_refused(compressor, value):
    x = torch.ones(1000)
    x[-1] = value
    with pytest.raises(NonFiniteError, match="NaN or infinities"):
        compressor.compress(x)


@pytest.mark.parametrize(
    ("compressor", "largest"),
    [(Natural(), 2.0**127), (RandK(0.1), 3e37), (contractive(RandK(0.1)), 3e37)],
    ids=repr,
)
def test_a_magnitude_that_would_not_survive_is_refused(compressor, largest):
    x = torch.full((1000,), largest)
    decoded = compressor.decompress(compressor.compress(x), 1000)
    assert bool(decoded.isfinite().all())
    with pytest.raises(NonFiniteError, match="takes up to"):
        compressor.compress(torch.full((1000,), 3.4e38))


def test_the_largest_floats_survive_where_they_can():
    x = torch.tensor([3.4028235e38, -3.4028235e38, 1.0] * 100)
    for compressor in (Identity(), TopK(0.5), Dithering(4), Dithering(1), Sign(), Sign(7)):
        decoded = compressor.decompress(compressor.compress(x, seed=2), 300)
        assert bool(decoded.isfinite().all())
    with pytest.raises(NonFiniteError, match="norm: max"):
        Dithering(4, norm="l2").compress(x)


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_who_must_send_something_says_that_it_was_not_finite(compressor):
    payload = compressor.non_finite_payload(1000)
    assert payload.numel() == compressor.payload_bytes(1000)
    with pytest.raises(NonFinitePayloadError):
        compressor.decompress(payload, 1000)
    out = torch.ones(1000)
    with pytest.raises(NonFinitePayloadError):
        compressor.accumulate(out, payload)
    assert torch.equal(out, torch.ones(1000))
    # Only the pure sentence is one; a receiver need not read what else it might carry.
    payload[-1] = 1
    with pytest.raises(PayloadError, match="status"):
        compressor.decompress(payload, 1000)


def test_other_types_and_shapes_and_seeds_are_refused():
    for x in (torch.ones(3, dtype=torch.float64), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="takes fp32 vectors"):
            Natural().compress(x)
    with pytest.raises(ValueError, match="seed is -1"):
        Natural().compress(torch.ones(3), seed=-1)
    with pytest.raises(ValueError, match="cut it into buckets"):
        Natural().payload_bytes(2**31)
    for make in (lambda: TopK(0.0), lambda: RandK(1.5), lambda: Dithering(9), lambda: Sign(0)):
        with pytest.raises(ValueError, match="wanted"):
            make()
    assert issubclass(NonFiniteError, CompressionError)
    assert issubclass(CompressionError, ValueError)
