"""Preparing data: what goes into the token file, and when it is made anew."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from gangline.trainers import prepare, token_file
from gangline.trainers.config import DataConfig
from gangline.trainers.data import (
    DataError,
    DatasetInfo,
    TokenDataset,
    prepare_dataset,
    read_info,
    verify,
)
from gangline.trainers.text_sources import read_pieces


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"document {number}: é漢 " * (number + 3))
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def all_tokens(info):
    dtype = np.dtype("<u2" if info.vocab_size <= 65536 else "<u4")
    data = Path(info.path).read_bytes()
    return np.frombuffer(data, dtype, info.num_tokens, token_file.HEADER_BYTES).tolist()


def prepared(source, cache, **fields):
    source = source if isinstance(source, (str, list)) else str(source)
    return prepare_dataset(DataConfig(source=source, **fields), cache)


def test_the_file_holds_the_documents_with_an_end_behind_each(corpus, cache):
    info = prepared(corpus, cache)
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    wanted = [token for text in texts for token in [*text.encode(), 256]]
    assert all_tokens(info) == wanted
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (info.num_tokens, info.num_documents) == (len(wanted), 5)
    assert (info.num_bytes, info.vocab_size, info.eos_id) == (num_bytes, 257, 256)
    assert info.tokenizer == "bytes"
    assert Path(info.path) == cache / f"{info.digest}.tokens"
    verify(info)


def test_a_long_document_has_one_end(tmp_path, cache):
    text = "".join(f"line {number}\n" for number in range(60_000))
    (tmp_path / "x.txt").write_text(text)
    info = prepared(tmp_path / "x.txt", cache)
    assert info.num_documents == 1
    assert bytes(all_tokens(info)[:-1]).decode() == text
    assert all_tokens(info)[-1] == 256


def test_a_large_vocabulary_gets_four_bytes_a_token(corpus, tmp_path, cache):
    vocabulary = {str(number): number for number in range(70_000)} | {"</s>": 70_000}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="69999"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "x.jsonl").write_text('{"text": "65535 65536 7"}\n{"text": "8"}\n')
    info = prepared(tmp_path / "x.jsonl", cache, tokenizer=str(tmp_path / "t.json"))
    assert all_tokens(info) == [65535, 65536, 7, 70_000, 8, 70_000]
    dataset = TokenDataset(info, seq_len=2, seed=0, validation_fraction=0)
    assert dataset.tokens(np.array([0, 1])).tolist() == [[65535, 65536, 7], [7, 70_000, 8]]


def test_the_digest_is_that_of_text_and_tokenizer_alone(corpus, tmp_path, cache):
    info = prepared(corpus, cache)
    lines = [json.dumps({"b": path.read_text()}) for path in sorted(corpus.iterdir())]
    (tmp_path / "same.jsonl").write_text("\n".join(lines))
    same = prepared(tmp_path / "same.jsonl", tmp_path / "other", text_field="b")
    assert same.digest == info.digest
    same_bytes = Path(same.path).read_bytes()
    assert same_bytes == Path(info.path).read_bytes()


def test_other_documents_give_another_digest(tmp_path, cache):
    lists = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", "c"], ["ab", "C"]]
    digests = set()
    for texts in lists:
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        digests.add(prepared(tmp_path / "x.jsonl", cache).digest)
    assert len(digests) == len(lists)


def test_another_tokenizer_gives_another_digest(corpus, tmp_path, cache):
    digests = {prepared(corpus, cache).digest}
    for number in range(2):
        model = tokenizers.models.WordLevel({"</s>": 0, str(number): 1}, unk_token="</s>")
        tokenizers.Tokenizer(model).save(str(tmp_path / "t.json"))
        digests.add(prepared(corpus, cache, tokenizer=str(tmp_path / "t.json")).digest)
    assert len(digests) == 3


def test_a_second_call_reads_no_text(corpus, cache, monkeypatch):
    monkeypatch.setattr(prepare, "SETTLE_S", -10)
    first = prepared(corpus, cache)
    monkeypatch.setattr(prepare, "read_pieces", None)
    assert prepared(corpus, cache) == first


@pytest.mark.parametrize("change", ["content", "size", "new file", "removed", "renamed"])
def test_changed_sources_are_read_again(corpus, cache, monkeypatch, change):
    monkeypatch.setattr(prepare, "SETTLE_S", -10)
    before = prepared(corpus, cache)
    path = corpus / "2.txt"
    times = path.stat()
    time.sleep(0.02)  # the clock of a file's change ticks every 4 to 10 ms
    if change == "content":
        # Same size, and the time of change of the content set back: only ctime tells.
        path.write_text(path.read_text().replace("document", "Document"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "size":
        path.write_text("x")
    elif change == "new file":
        (corpus / "9.txt").write_text("x")
    elif change == "removed":
        path.unlink()
    else:
        path.rename(corpus / "z.txt")
    after = prepared(corpus, cache)
    assert after.digest != before.digest
    verify(before)
    verify(after)


def test_sources_that_are_too_fresh_are_not_remembered(corpus, cache):
    prepared(corpus, cache)
    assert not list((cache / "sources").glob("*.digest"))


def test_sources_that_change_while_they_are_read_are_read_again(corpus, cache, monkeypatch):
    monkeypatch.setattr(prepare, "SETTLE_S", -10)

    def read_and_change(file, text_field):
        yield from read_pieces(file, text_field)
        if file.path.endswith("4.txt"):
            time.sleep(0.02)
            (corpus / "0.txt").write_text("changed behind the reader's back")

    monkeypatch.setattr(prepare, "read_pieces", read_and_change)
    old = prepared(corpus, cache)
    monkeypatch.setattr(prepare, "read_pieces", read_pieces)
    assert prepared(corpus, cache).digest != old.digest


@pytest.mark.parametrize("note", [b"", b"garbage", bytes(32)])
def test_a_damaged_note_is_no_matter(corpus, cache, monkeypatch, note):
    monkeypatch.setattr(prepare, "SETTLE_S", -10)
    first = prepared(corpus, cache)
    (path,) = (cache / "sources").glob("*.digest")
    path.write_bytes(note)
    assert prepared(corpus, cache) == first


@pytest.mark.parametrize("damage", ["cut", "removed", "header"])
def test_a_damaged_token_file_is_made_anew(corpus, cache, monkeypatch, damage):
    monkeypatch.setattr(prepare, "SETTLE_S", -10)
    first = prepared(corpus, cache)
    path = Path(first.path)
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data[:20] + b"?" + data[21:])
    messages: list[str] = []
    again = prepare_dataset(DataConfig(source=str(corpus)), cache, messages.append)
    assert again == first
    assert path.read_bytes() == data
    assert damage == "removed" or "preparing the data again" in messages[0]


def test_a_resumed_run_opens_the_dataset_without_its_sources(corpus, cache):
    info = prepared(corpus, cache)
    for path in corpus.iterdir():
        path.unlink()
    carried = DatasetInfo.from_json(json.loads(json.dumps(info.to_json())))
    assert carried == info == read_info(Path(info.path))
    assert TokenDataset(carried, seq_len=8, seed=0, validation_fraction=0).num_samples > 1


def test_progress_is_reported(corpus, cache, monkeypatch):
    monkeypatch.setattr(prepare, "_REPORT_EVERY_S", 0)
    messages: list[str] = []
    prepare_dataset(DataConfig(source=str(corpus)), cache, messages.append)
    assert messages[0].startswith("tokenised 0.0 MB of text, 5 of 5 files")
    assert messages[-1].startswith("prepared ")
    assert "5 documents" in messages[-1]


def test_text_without_content_is_refused(tmp_path, cache):
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "y.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"data\.source .* holds no text: 2 files"):
        prepared([str(tmp_path / "x.txt"), str(tmp_path / "y.jsonl")], cache)
    assert not list(cache.glob("*.*"))


def test_a_refused_source_leaves_nothing_behind(corpus, cache):
    (corpus / "9.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="UTF-8"):
        prepared(corpus, cache)
    assert not list(cache.glob("*.*"))


def test_a_cache_that_cannot_be_written_is_refused(corpus, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="token cache"):
        prepared(corpus, tmp_path / "file" / "cache")


def test_a_full_disk_is_refused_and_leaves_nothing(corpus, cache, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DataError, match="No space left on device"):
        prepared(corpus, cache)
    assert not list(cache.glob("*.*"))


def test_python_docs_need_no_download(cache):
    info = prepared("python-docs", cache)
    assert info.num_tokens > 1_500_000
    assert prepared("python-docs", cache) == info
