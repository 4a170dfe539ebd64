"""The token file: damage of any kind is found and named."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.trainers import token_file
from gangline.trainers.config import DataConfig
from gangline.trainers.data import (
    DatasetInfo,
    TokenDataset,
    TokenFileError,
    prepare_dataset,
    read_info,
    verify,
)


def all_tokens(info):
    dtype = np.dtype("<u2" if info.vocab_size <= 65536 else "<u4")
    data = Path(info.path).read_bytes()
    return np.frombuffer(data, dtype, info.num_tokens, token_file.HEADER_BYTES).tolist()


def prepared(source, cache, **fields):
    source = source if isinstance(source, (str, list)) else str(source)
    return prepare_dataset(DataConfig(source=source, **fields), cache)


@pytest.fixture
def info(tmp_path):
    """Several blocks of tokens, the last not full."""
    rng = np.random.default_rng(0)
    (tmp_path / "x.txt").write_bytes(rng.integers(32, 127, 20_001, dtype=np.uint8).tobytes())
    return prepared(tmp_path / "x.txt", tmp_path)


def read_everything(info):
    dataset = TokenDataset(info, seq_len=100, seed=0, validation_fraction=0.1)
    dataset.tokens(np.arange(dataset.num_samples))
    dataset.validation_tokens(np.arange(dataset.num_validation_samples))


def test_an_altered_byte_is_found_wherever_it_is(info):
    path = Path(info.path)
    good = path.read_bytes()
    length = int.from_bytes(good[40:44], "little")
    tokens_end = token_file.HEADER_BYTES + 2 * info.num_tokens
    checks = token_file.HEADER_BYTES + -(-2 * info.num_tokens // 4096) * 4096
    rng = np.random.default_rng(1)
    places = [
        *range(44 + length),
        *rng.integers(token_file.HEADER_BYTES, tokens_end, 200),
        token_file.HEADER_BYTES,
        tokens_end - 1,
        *range(checks, len(good)),
    ]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        with pytest.raises(TokenFileError, match=path.name) as caught:
            verify(info)
        assert "so that it is made anew" in str(caught.value), place
        with pytest.raises(TokenFileError, match=path.name):
            read_everything(info)


def test_tokens_and_checks_altered_together_are_found_by_verify(info):
    path = Path(info.path)
    data = bytearray(path.read_bytes())
    start = token_file.HEADER_BYTES
    data[start] ^= 1
    checks = start + -(-2 * info.num_tokens // 4096) * 4096
    crc = zlib.crc32(data[start : start + token_file.BLOCK_BYTES])
    data[checks : checks + 4] = crc.to_bytes(4, "little")
    path.write_bytes(data)
    read_everything(info)
    with pytest.raises(TokenFileError, match="SHA-256"):
        verify(info)


def test_any_other_length_is_refused(info):
    path = Path(info.path)
    good = path.read_bytes()
    for size in {0, 1, 7, 44, 4096, token_file.HEADER_BYTES, len(good) // 2, len(good) - 1}:
        path.write_bytes(good[:size])
        with pytest.raises(TokenFileError, match=path.name):
            read_everything(info)
    path.write_bytes(good + b"\0")
    with pytest.raises(TokenFileError, match="cut short or added to"):
        read_everything(info)


def test_a_missing_file_is_refused(info):
    Path(info.path).unlink()
    with pytest.raises(TokenFileError, match="No such file"):
        read_everything(info)


def test_another_dataset_under_that_name_is_refused(info, tmp_path):
    (tmp_path / "y.txt").write_text("something else")
    other = prepared(tmp_path / "y.txt", tmp_path)
    os.replace(other.path, info.path)
    with pytest.raises(TokenFileError, match=f"holds dataset {other.digest}, wanted"):
        read_everything(info)


def test_another_version_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("text")
    monkeypatch.setattr(token_file, "FORMAT_VERSION", 99)
    path = tmp_path / "x.tokens"
    with token_file.TokenFileWriter(path, 257) as writer:
        writer.write(np.arange(9))
        writer.finish(digest="d", num_documents=1, num_bytes=9, tokenizer="bytes", eos_id=256)
    monkeypatch.undo()
    with pytest.raises(TokenFileError, match="another format version"):
        read_info(path)


def test_an_unfinished_file_is_refused(tmp_path):
    path = tmp_path / "x.tokens"
    with token_file.TokenFileWriter(path, 257) as writer:
        writer.write(np.arange(9))
    with pytest.raises(TokenFileError, match="not a token file"):
        read_info(path)


def test_the_longest_path_of_a_tokenizer_fits_into_the_header(tmp_path):
    name = os.fsdecode(b"\xff" * 4096)
    path = tmp_path / "x.tokens"
    with token_file.TokenFileWriter(path, 257) as writer:
        writer.write(np.arange(9))
        writer.finish(digest="d", num_documents=1, num_bytes=9, tokenizer=name, eos_id=256)
    assert read_info(path).tokenizer == name


@given(
    sizes=st.lists(st.integers(0, 20_000), min_size=1, max_size=6).filter(any),
    vocab_size=st.sampled_from([257, 65536, 65537]),
)
@settings(max_examples=25, deadline=None)
def test_however_it_is_written_it_verifies(tmp_path_factory, sizes, vocab_size):
    path = tmp_path_factory.mktemp("t") / "x.tokens"
    tokens = np.random.default_rng(0).integers(0, vocab_size, sum(sizes))
    with token_file.TokenFileWriter(path, vocab_size) as writer:
        for part in np.split(tokens, np.cumsum(sizes)[:-1]):
            writer.write(part)
        writer.finish(digest="d", num_documents=1, num_bytes=1, tokenizer="x", eos_id=0)
    info = read_info(path)
    verify(info)
    assert all_tokens(info) == tokens.tolist()


@pytest.mark.parametrize(
    "change",
    [{"extra": 1}, {"num_tokens": "7"}, {"num_tokens": True}, {"digest": None}, {"path": ...}],
)
def test_a_description_with_wrong_fields_is_refused(info, change):
    values = info.to_json() | change
    if change == {"path": ...}:
        del values["path"]
    with pytest.raises(TokenFileError, match=next(iter(change))):
        DatasetInfo.from_json(values)
