"""pack and unpack against their references; lists of positions, honest and hostile."""

import math
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gangline.kernels import bitpack


@st.composite
def positions(draw):
    """Return (num_elements, increasing positions), crowded, spread or few."""
    num_elements = draw(st.integers(1, 3000))
    num_kept = draw(st.integers(0, min(num_elements, 8)) | st.integers(0, num_elements))
    generator = random.Random(draw(st.integers(0, 2**32)))
    span = draw(st.integers(max(num_kept, 1), num_elements))  # how far they reach
    start = draw(st.integers(0, num_elements - span))
    return num_elements, sorted(start + p for p in generator.sample(range(span), num_kept))


@pytest.mark.parametrize("width", range(33))
@pytest.mark.parametrize("num", [0, 1, 7, 8, 63, 1000])
def test_packing_is_the_references_and_comes_back(width, num):
    generator = torch.Generator().manual_seed(num)
    values = torch.randint(0, 2**width, (num,), generator=generator)
    values = values.to(torch.uint8) if width <= 8 else values
    packed = bitpack.pack(values, width)
    assert packed.numel() == bitpack.packed_bytes(num, width) == math.ceil(num * width / 8)
    assert torch.equal(packed, bitpack.pack_ref(values, width))
    for unpack in (bitpack.unpack, bitpack.unpack_ref):
        assert torch.equal(unpack(packed, num, width), values)


@pytest.mark.parametrize("width", [1, 3, 4, 7, 13])
def test_more_than_one_block_packs_alike(width):
    values = torch.randint(0, 2**width, (70_001,), generator=torch.Generator().manual_seed(0))
    values = values.to(torch.uint8) if width <= 8 else values
    packed = bitpack.pack(values, width)
    assert torch.equal(packed, bitpack.pack_ref(values, width))
    assert torch.equal(bitpack.unpack(packed, 70_001, width), values)


def test_up_to_eight_bits_the_layout_is_the_plain_bit_stream():
    values = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 5], dtype=torch.uint8)
    stream = sum(int(value) << (3 * place) for place, value in enumerate(values))
    assert bytes(bitpack.pack(values, 3).numpy()) == stream.to_bytes(4, "little")


@settings(max_examples=200, deadline=None)
@given(case=positions())
@example(case=(1, [0]))
@example(case=(8, list(range(8))))
def test_positions_come_back_and_take_what_the_formula_says(case):
    num_elements, wanted = case
    num_kept = len(wanted)
    packed = bitpack.pack_indices(torch.tensor(wanted, dtype=torch.int64), num_elements)
    assert packed.numel() == bitpack.index_bytes(num_elements, num_kept)
    found = bitpack.unpack_indices(packed, num_elements, num_kept)
    places = found.nonzero().flatten() if found.dtype is torch.bool else found
    assert places.tolist() == wanted
    # Never longer than a bitmap, nor than plain numbers by more than a byte.
    width = max(num_elements - 1, 0).bit_length()
    plain, bitmap = math.ceil(num_kept * width / 8), math.ceil(num_elements / 8)
    assert packed.numel() <= min(plain + 1, bitmap)


def test_the_coding_follows_from_the_numbers_alone():
    assert not bitpack.is_bitmap(25_000_000, 250_000)
    assert bitpack.is_bitmap(25_000_000, 12_500_000)
    # l = floor(log2 100) = 6: 6 bits each, and a bitmap of k + (n - 1) / 64 bits.
    wanted = math.ceil(250_000 * 6 / 8) + math.ceil((250_000 + 24_999_999 // 64) / 8)
    assert bitpack.index_bytes(25_000_000, 250_000) == wanted == 267_578
    for num_elements in (2, 100, 5000):
        for num_kept in (1, 2, num_elements // 10, num_elements // 3, num_elements):
            length = bitpack.index_bytes(num_elements, num_kept)
            entropy = math.log2(math.comb(num_elements, num_kept)) / 8
            assert length >= math.floor(entropy), "shorter than any code can be"


@pytest.mark.parametrize(("num_elements", "num_kept"), [(1000, 1), (1000, 10), (1000, 900)])
def test_bytes_that_no_sender_writes_are_refused(num_elements, num_kept):
    length = bitpack.index_bytes(num_elements, num_kept)
    ones = torch.full((length,), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"not zero|marked|not below|increasing"):
        bitpack.unpack_indices(ones, num_elements, num_kept)
    if num_kept > 1:
        zeros = torch.zeros(length, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"marked|increasing"):
            bitpack.unpack_indices(zeros, num_elements, num_kept)


@settings(max_examples=200, deadline=None)
@given(case=positions(), seed=st.integers(0, 2**32), num_flips=st.integers(1, 4))
def test_what_is_accepted_is_increasing_and_in_range_whatever_was_flipped(case, seed, num_flips):
    num_elements, wanted = case
    packed = bitpack.pack_indices(torch.tensor(wanted, dtype=torch.int64), num_elements)
    if packed.numel() == 0:
        return
    generator = random.Random(seed)
    for _ in range(num_flips):
        packed[generator.randrange(packed.numel())] ^= 1 << generator.randrange(8)
    try:
        found = bitpack.unpack_indices(packed, num_elements, len(wanted))
    except ValueError:
        return
    places = found.nonzero().flatten() if found.dtype is torch.bool else found
    assert places.numel() == len(wanted)
    assert bool((places[1:] > places[:-1]).all())
    assert int(places[0]) >= 0
    assert int(places[-1]) < num_elements
    # One way to write a list: what was accepted is what would be written.
    assert torch.equal(bitpack.pack_indices(places, num_elements), packed)
