"""Settings of a compressor: what they make, what they refuse, and that they need no torch."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from gangline.comm.compression_settings import CompressionSettings
from gangline.comm.compressors import Dithering, Identity, Natural, RandK, Sign, TopK, make

MADE: list[tuple[dict, object]] = [
    ({"kind": "identity"}, Identity()),
    ({"kind": "top_k", "fraction": 0.01}, TopK(0.01)),
    ({"kind": "rand_k", "fraction": 1}, RandK(1.0)),
    ({"kind": "dithering"}, Dithering(4, 512, "max")),
    (
        {"kind": "dithering", "bits": 1, "bucket_size": 64, "norm": "l2"},
        Dithering(1, 64, "l2"),
    ),
    ({"kind": "natural"}, Natural()),
    ({"kind": "scaled_sign"}, Sign()),
    ({"kind": "group_sign"}, Sign(512)),
    ({"kind": "group_sign", "group_size": 7}, Sign(7)),
]


@pytest.mark.parametrize(("given", "wanted"), MADE, ids=str)
def test_settings_make_their_compressor_and_survive_a_round_trip(given, wanted):
    settings = CompressionSettings.model_validate(given)
    assert make(settings) == wanted
    assert CompressionSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize("given", [given for given, _ in MADE], ids=str)
def test_plans_are_told_what_compressors_are(given):
    settings = CompressionSettings.model_validate(given)
    compressor = make(settings)
    assert settings.is_contractive == (compressor.kind == "contractive")
    exact = compressor.payload_bytes(1_000_000) / 1_000_000
    assert settings.bytes_per_element == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.03, 0.2, 0.3, 0.7])
def test_the_estimate_holds_for_every_fraction(fraction):
    settings = CompressionSettings(kind="top_k", fraction=fraction)
    exact = make(settings).payload_bytes(1_000_000) / 1_000_000
    assert settings.bytes_per_element == pytest.approx(exact, rel=0.02)


def test_every_kind_has_a_compressor():
    kinds = CompressionSettings.model_json_schema()["properties"]["kind"]["enum"]
    assert {given["kind"] for given, _ in MADE} == set(kinds)


def test_what_a_kind_takes_by_default_is_written_out():
    resolved = CompressionSettings(kind="dithering").model_dump(exclude_none=True)
    assert resolved == {"kind": "dithering", "bits": 4, "bucket_size": 512, "norm": "max"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "top_k"}, "fraction is missing, which kind top_k needs"),
        ({"kind": "rand_k", "fraction": None}, "fraction is missing, which kind rand_k needs"),
        ({"kind": "top_k", "fraction": 0.1, "bits": 4}, "bits is not a setting of kind top_k"),
        ({"kind": "natural", "fraction": 0.1}, "set kind to top_k or rand_k"),
        ({"kind": "scaled_sign", "group_size": 9}, "set kind to group_sign"),
        ({"kind": "top_k", "fraction": 0.0}, "greater than 0"),
        ({"kind": "top_k", "fraction": 1.01}, "less than or equal to 1"),
        ({"kind": "top_k", "fraction": "0.1"}, "valid number"),
        ({"kind": "dithering", "bits": 9}, "less than or equal to 8"),
        ({"kind": "dithering", "bucket_size": 2**24}, "less than or equal to 16777215"),
        ({"kind": "topk", "fraction": 0.1}, "'identity', 'top_k'"),
        ({"kind": "top_k", "fraction": 0.1, "ratio": 1}, "Extra inputs"),
        ({"fraction": 0.1}, "kind"),
        ([], "dictionary"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(given, words):
    with pytest.raises(ValidationError, match=words):
        CompressionSettings.model_validate(given)


def test_a_section_of_a_file_is_named_in_full():
    class Section(CompressionSettings):
        path = "optimizer.compression."

    with pytest.raises(ValidationError, match=r"set optimizer\.compression\.fraction to such as"):
        Section.model_validate({"kind": "top_k"})
    with pytest.raises(ValidationError, match=r"leave optimizer\.compression\.bits out"):
        Section.model_validate({"kind": "natural", "bits": 4})


@pytest.mark.parametrize("kind", [{}, [], 3, None, True])
def test_a_kind_that_is_no_text_is_refused(kind):
    with pytest.raises(ValidationError, match="kind"):
        CompressionSettings.model_validate({"kind": kind, "fraction": 0.1})


def test_the_settings_need_no_torch():
    program = "import sys, gangline.comm.compression_settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
