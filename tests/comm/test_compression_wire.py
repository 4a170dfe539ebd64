"""The bytes: pinned for ever, the same in another process, and what becomes of hostile ones."""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gangline.comm.compression import NonFinitePayloadError, PayloadError
from gangline.comm.compressors import Dithering, Identity, Natural, RandK, Shrunk, Sign, TopK

from .compressor_cases import ALL, CONTRACTIVE, UNBIASED, vectors

MEMORY_SCRIPT = Path(__file__).with_name("compression_memory.py")


def whole_numbers(num):
    """Return a vector whose scales are exact on every platform."""
    return torch.tensor([float((7919 * i) % 1021 - 510) for i in range(num)])


# SHA-256 of the payload of whole_numbers(1000) at seed 5, first 16 digits. A change of any of them
# is another format: raise compression_wire.VERSION, and say in the changelog who cannot read whom.
PINNED = {
    Identity(): "b3236c7519875c61",
    TopK(0.01): "bad095fa071e37c7",
    TopK(0.5): "6f6423fd44c2d23d",
    RandK(0.1): "7dacd91a2f1d3bb6",
    Dithering(1): "4ed0abf2160940c2",
    Dithering(4): "5d025ebdba60ee4c",
    Natural(): "e5bfdf6ce351350d",
    Sign(): "c4cbadf8c6b501da",
    Sign(100): "dfc43606c630bc60",
    Shrunk(Natural()): "17cd7790f3772838",
}


def digest(payload):
    return hashlib.sha256(payload.numpy().tobytes()).hexdigest()[:16]


def test_the_bytes_are_those_of_the_first_version():
    for compressor, wanted in PINNED.items():
        assert digest(compressor.compress(whole_numbers(1000), seed=5)) == wanted, compressor


def test_the_header_is_what_the_description_says():
    payload = bytes(TopK(0.01).compress(whole_numbers(1000)).numpy())
    assert struct.unpack_from("<2sBBIII", payload) == (b"GC", 1, 2, 10, 1000, 0)
    payload = bytes(Shrunk(Dithering(3, 100)).compress(whole_numbers(1000)).numpy())
    assert struct.unpack_from("<2sBBIII", payload) == (b"GC", 1, 128 + 4, 3 << 24 | 100, 1000, 0)


def test_the_fields_are_what_the_description_says():
    x = torch.tensor([4.0, -8.0, 1.0, 8.0])
    body = bytes(TopK(0.5).compress(x).numpy())[16:]
    assert body == struct.pack("<2f", -8.0, 8.0) + bytes([0b1010])  # values, bitmap
    body = bytes(Natural().compress(x).numpy())[16:]
    assert body == bytes([129, 130, 127, 130, 0b0010])  # exponents, signs
    body = bytes(Sign().compress(x).numpy())[16:]
    assert body == struct.pack("<f", 5.25) + bytes([0b1101])  # scale, signs
    body = bytes(Dithering(4, 512).compress(torch.tensor([7.0, -7.0, 3.0])).numpy())[16:]
    assert body == struct.pack("<f", 7.0) + bytes([0x0E, 0x0A])  # scale, codes 14, 0, 10
    body = bytes(RandK(0.5).compress(x, seed=2**63).numpy())[16:]
    assert body[:8] == (2**63).to_bytes(8, "little")
    assert RandK(0.5).seed_of(RandK(0.5).compress(x, seed=77), 4) == 77


def test_another_process_with_other_threads_writes_and_reads_the_same_bits(tmp_path):
    program = """
import hashlib, json, sys, torch
torch.set_num_threads(3)
sys.path.insert(0, sys.argv[1])
from compressor_cases import ALL, vectors
found = []
for number, compressor in enumerate(ALL):
    payload = compressor.compress(vectors(3000)["normal"], seed=9)
    foreign = open(f"{sys.argv[2]}/{number}", "rb").read()
    decoded = compressor.decompress(foreign, 3000)
    found.append([hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (payload, decoded)])
print(json.dumps(found))
"""
    wanted = []
    for number, compressor in enumerate(ALL):
        payload = compressor.compress(vectors(3000)["normal"], seed=9)
        (tmp_path / str(number)).write_bytes(payload.numpy().tobytes())
        decoded = compressor.decompress(payload, 3000)
        wanted.append([hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (payload, decoded)])
    here = str(Path(__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", program, here, str(tmp_path)], capture_output=True, check=True
    )
    assert json.loads(run.stdout) == wanted


def refusal(compressor, payload, num_elements):
    with pytest.raises(PayloadError) as refused:
        compressor.decompress(payload, num_elements)
    text = str(refused.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_other_lengths_and_headers_are_refused(compressor):
    payload = compressor.compress(vectors(300)["normal"])
    good = bytes(payload.numpy())
    assert "bytes, wanted" in refusal(compressor, good[:-1], 300)
    assert "bytes, wanted" in refusal(compressor, good + b"\0", 300)
    assert "bytes, wanted" in refusal(compressor, b"", 300)
    for place, name in ((0, "magic"), (2, "version"), (3, "kind"), (4, "parameter"), (8, "number")):
        bad = bytearray(good)
        bad[place] ^= 1
        assert f"payload's {name}" in refusal(compressor, bad, 300)
    bad = bytearray(good)
    bad[12] = 2
    assert "status is 2" in refusal(compressor, bad, 300)
    with pytest.raises(PayloadError, match="wanted uint8"):
        compressor.decompress(payload.view(torch.int8), 300)


def test_a_payload_for_other_settings_is_refused_by_name():
    x = vectors(300)["normal"]
    same_length = [(Sign(300), Sign(None)), (RandK(0.1), Shrunk(RandK(0.1)))]
    for sender, receiver in same_length:
        assert sender.payload_bytes(300) == receiver.payload_bytes(300)
        text = refusal(receiver, sender.compress(x), 300)
        assert "must have the same compression settings" in text


@pytest.mark.parametrize(
    ("compressor", "place", "data", "reason"),
    [
        (Identity(), 16, struct.pack("<f", float("nan")), "NaN or infinities"),
        (TopK(0.5), 16, struct.pack("<f", float("inf")), "NaN or infinities"),
        (RandK(0.5), 24, struct.pack("<f", float("-inf")), "NaN or infinities"),
        (Dithering(4, 50), 20, struct.pack("<f", float("nan")), "NaN or infinities"),
        (Dithering(4, 50), 20, struct.pack("<f", -1.0), "negative scale"),
        (Sign(50), 20, struct.pack("<f", -1e-45), "negative scale"),
        (Dithering(4, 50), 24, b"\xff", "code 15, wanted 0 to 14"),
        (Dithering(5, 50), 24 + 62, b"\xff", "bits after the last value"),
        (Natural(), 16, b"\xff", "code 255, wanted 0 to 254"),
        (Natural(), -1, b"\x10", "bits after the last value"),
        (Sign(), -1, b"\x10", "bits after the last value"),
        (TopK(0.5), -1, b"\xff", "bits after the last value"),
        (TopK(0.5), -3, b"\x00", "positions are marked"),
        (TopK(0.05), -3, b"\xff\xff\xff", "bits after|positions are marked"),
    ],
    ids=str,
)
def test_fields_that_no_sender_writes_are_refused(compressor, place, data, reason):
    payload = bytearray(compressor.compress(vectors(100)["normal"]).numpy().tobytes())
    start = place % len(payload)
    payload[start : start + len(data)] = data
    with pytest.raises(PayloadError, match=reason):
        compressor.decompress(payload, 100)
    out = torch.ones(100)
    with pytest.raises(PayloadError, match=reason):
        compressor.accumulate(out, payload)
    assert torch.equal(out, torch.ones(100)), "a refused payload has left a trace"


def test_positions_out_of_range_twice_or_out_of_order_are_refused():
    compressor, num = TopK(0.05), 100  # 5 positions, 4 low bits each, then 5 + 6 flags
    x = torch.zeros(num)
    x[[1, 2, 3, 17, 99]] = 1.0
    payload = bytearray(compressor.compress(x).numpy().tobytes())
    low = 16 + 20
    assert payload[low : low + 3] == bytes([0x21, 0x13, 0x03])
    for nibbles, reason in (
        ([0x11, 0x13, 0x03], "not increasing"),  # 1 twice
        ([0x12, 0x13, 0x03], "not increasing"),  # 2, 1
        ([0x21, 0x13, 0x04], "100 is not below 100"),
        ([0x21, 0x13, 0x13], "bits after the last value"),
    ):
        payload[low : low + 3] = bytes(nibbles)
        with pytest.raises(PayloadError, match=reason):
            compressor.decompress(payload, num)


def fuzz(num_mutations, seed):
    """Mutate payloads; return how many were refused. What is accepted must be finite."""
    generator = random.Random(seed)
    honest = [
        (compressor, num, compressor.compress(vectors(num)["normal"], seed=seed).numpy().tobytes())
        for compressor in ALL
        for num in (1, 2, 9, 100, 300)
    ]
    num_refused = 0
    for turn in range(num_mutations):
        compressor, num, unharmed = generator.choice(honest)
        payload = bytearray(unharmed)
        for _ in range(generator.choice([1, 1, 2, 8])):
            kind, place = generator.randrange(6), generator.randrange(len(payload) or 1)
            if kind == 0 and payload:
                payload[place] ^= 1 << generator.randrange(8)
            elif kind == 1 and payload:
                payload[place] = generator.choice([0, 1, 127, 128, 255])
            elif kind == 2 and len(payload) > 20:
                word = generator.choice([0, 1, 0x7F800000, 0x7FC00000, 0xFFFFFFFF, 0x7F7FFFFF])
                start = min(place, len(payload) - 4)
                payload[start : start + 4] = word.to_bytes(4, "little")
            elif kind == 3:
                payload = payload[:place]
            elif kind == 4:
                payload += generator.randbytes(generator.randrange(1, 5))
            elif kind == 5 and len(payload) > 16:
                payload[16:] = generator.randbytes(len(payload) - 16)
        try:
            decoded = compressor.decompress(payload, num)
        except PayloadError:
            num_refused += 1
            continue
        assert decoded.shape == (num,), f"replay: fuzz({num_mutations}, {seed}), turn {turn}"
        assert bool(decoded.isfinite().all()), f"fuzz({num_mutations}, {seed}), turn {turn}"
    return num_refused


def test_twenty_thousand_mutations_end_in_a_refusal_or_a_finite_vector():
    num_refused = fuzz(20_000, seed=1)
    # Bits of values, signs and codes are free, so by far not all can be refused.
    assert 10_000 < num_refused < 19_500


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_million_mutations_end_in_a_refusal_or_a_finite_vector():
    assert fuzz(1_000_000, seed=random.SystemRandom().randrange(2**32)) > 500_000


def test_hostile_bytes_cost_less_than_three_times_the_vector():
    run = subprocess.run(
        [sys.executable, str(MEMORY_SCRIPT)],
        capture_output=True,
        text=True,
        check=True,
        # What is freed goes back at once, so that each case's peak is its own.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    found = json.loads(run.stdout)
    assert len(found) == 3 * len(UNBIASED + CONTRACTIVE)
    assert all(growth > 0.9 for _, outcome, growth in found if outcome == "decoded")
    for name, outcome, growth in found:
        assert growth < 3.0, f"{name} {outcome}: {growth:.2f} times the vector"
    assert {outcome for _, outcome, _ in found} == {"decoded", "refused"}


def test_a_copy_is_taken_of_nothing_before_the_length_is_right():
    with pytest.raises(PayloadError, match=f"{2**40} bytes"):
        Identity().decompress(_Huge(), 100)


class _Huge(torch.Tensor):
    """Claim a terabyte."""

    def numel(self):
        return 2**40


def test_a_payload_that_says_not_finite_is_its_own_kind_of_refusal():
    assert issubclass(NonFinitePayloadError, PayloadError)
