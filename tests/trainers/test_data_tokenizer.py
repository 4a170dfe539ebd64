"""Tokenizers: text comes back, documents cannot forge their end, bad files are refused."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gangline.trainers.data_errors import DataError
from gangline.trainers.tokenizer import load_tokenizer

TEXTS = ["", "plain text", "  two\n\n lines\t", "é 漢 😀 \0", "a <|endoftext|> b", "x" * 500]


def byte_level_bpe(end="<|endoftext|>"):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[end],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["plain text with more plain text in it"], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    byte_level_bpe().save(str(path))
    return str(path)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe_path):
    return load_tokenizer("bytes" if request.param == "bytes" else bpe_path)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size


@given(st.text())
def test_any_text_comes_back_from_bytes(text):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_are_encoded_like_texts(tokenizer):
    encoded = tokenizer.encode_pieces([text.encode() for text in TEXTS])
    assert [ids.tolist() for ids in encoded] == [tokenizer.encode(text) for text in TEXTS]
    assert all(ids.dtype in (np.uint8, np.uint32) for ids in encoded)


def test_bytes_are_257_tokens():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]


def test_half_a_character_shows_as_replacement():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode([0xA9, 97, 256, 0xC3]) == "�a�"


@pytest.mark.parametrize("token", [-1, 257, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(DataError, match=f"token id {token} is outside the vocabulary of 257"):
        load_tokenizer("bytes").decode([97, token])


def test_end_tokens_vanish_when_decoding(tokenizer):
    ids = [*tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode("two")]
    assert tokenizer.decode(ids) == "onetwo"


def test_a_file_that_cuts_and_fills_does_not(tmp_path):
    inner = byte_level_bpe()
    inner.enable_truncation(max_length=4)
    inner.enable_padding(length=16)
    inner.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    for text in ("plain text with more plain text in it", "p"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_pieces([text.encode()])[0].tolist() == tokenizer.encode(text)
    assert len(tokenizer.encode("p")) == 1


def test_a_post_processor_adds_nothing(tmp_path):
    inner = byte_level_bpe("</s>")
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", inner.token_to_id("</s>"))]
    )
    inner.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.eos_id not in tokenizer.encode("plain")


def test_the_digest_is_that_of_the_content(tmp_path, bpe_path):
    same = tmp_path / "other name.json"
    same.write_bytes(Path(bpe_path).read_bytes())
    assert load_tokenizer(str(same)).digest == load_tokenizer(bpe_path).digest
    same.write_bytes(same.read_bytes() + b"\n")
    assert load_tokenizer(str(same)).digest != load_tokenizer(bpe_path).digest


def test_the_vocabulary_reaches_to_the_highest_id(tmp_path):
    model = tokenizers.models.WordLevel({"a": 0, "</s>": 7}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "gaps.json"))
    tokenizer = load_tokenizer(str(tmp_path / "gaps.json"))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (8, 7)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "is not a file"),
        (b"", "is not a tokenizer"),
        (b"\xff\xfe", "is not a tokenizer"),
        (b"{}", "is not a tokenizer"),
        (b"[" * 100_000, "is not a tokenizer"),
        (byte_level_bpe("<end>").to_str().encode(), "no end-of-document token"),
    ],
)
def test_an_unusable_file_is_refused_by_name(tmp_path, content, part):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(path))
    assert part in str(caught.value)
    assert repr(str(path)) in str(caught.value)
    assert "data.tokenizer" in str(caught.value)


@pytest.mark.parametrize("spec", [".", "byte", "no\0name", "/dev/zero", "n" * 400])
def test_what_is_no_file_is_refused(spec):
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        load_tokenizer(spec)
