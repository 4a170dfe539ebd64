"""Documents: what a file of each format gives, and what is refused how."""

import contextlib
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.trainers import text_sources
from gangline.trainers.data_errors import DataError
from gangline.trainers.source_files import find_files
from gangline.trainers.text_sources import read_pieces


def documents(source, text_field="text"):
    """Read everything and join the pieces of each document."""
    texts, parts = [], []
    for file in find_files(source):
        for piece in read_pieces(file, text_field):
            assert 0 < len(piece.text) <= text_sources.PIECE_BYTES
            parts.append(piece.text)
            if piece.ends_document:
                texts.append(b"".join(parts).decode())
                parts = []
        assert not parts, "a document must end with its file"
    return texts


def refused(source, text_field="text"):
    """Give the message of the refusal; any other exception fails the test."""
    with pytest.raises(DataError) as caught:
        documents(source, text_field)
    message = str(caught.value)
    assert "data.source" in message or "data.text_field" in message
    assert "wanted" in message or "set data." in message
    return message


class TestText:
    def test_a_file_is_a_document(self, tmp_path):
        (tmp_path / "1.txt").write_text("eins\r\nzwei", newline="")
        (tmp_path / "2.md").write_text("")
        (tmp_path / "3.rst").write_bytes(b"\xef\xbb\xbfdrei\0")
        assert documents(str(tmp_path)) == ["eins\r\nzwei", "drei\0"]

    @given(
        text=st.text(st.sampled_from("ab\n é漢😀"), max_size=400),
        piece_bytes=st.integers(4, 40),
        read_bytes=st.integers(3, 60),
    )
    @settings(deadline=None)
    def test_pieces_join_to_the_text_and_do_not_depend_on_the_reading(
        self, tmp_path_factory, text, piece_bytes, read_bytes
    ):
        path = tmp_path_factory.mktemp("t") / "x.txt"
        path.write_bytes(text.encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_sources, "PIECE_BYTES", piece_bytes)
            patch.setattr(text_sources, "_READ_BYTES", read_bytes)
            pieces = [p for file in find_files(str(path)) for p in read_pieces(file, "text")]
            whole = list(text_sources._cut([text.encode()] if text else []))
        assert pieces == whole
        assert "".join(piece.text.decode() for piece in pieces) == text
        assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True] * (
            len(pieces) > 0
        )
        for piece in pieces[:-1]:
            # Full as far as a newline, or else a character, allows.
            assert piece.text.endswith(b"\n") or len(piece.text) > piece_bytes - 4

    @pytest.mark.parametrize(
        ("data", "line"),
        [(b"ok\nok\n\xff\n", 3), (b"\xc3", 1), (b"x\n" * 100_000 + b"\xe2\x82", 100_001)],
    )
    def test_broken_utf8_is_refused_with_its_line(self, tmp_path, data, line):
        path = tmp_path / "x.txt"
        path.write_bytes(data)
        message = refused(str(path))
        assert f"{str(path)!r}, line {line} is not UTF-8" in message

    @given(data=st.binary(max_size=60))
    @settings(deadline=None)
    def test_any_bytes_are_read_or_refused(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("t")
        for suffix in (".txt", ".txt.gz", ".md.zst", ".jsonl", ".parquet"):
            path = folder / f"x{suffix}"
            path.write_bytes(data)
            with contextlib.suppress(DataError):
                documents(str(path))


class TestCompressed:
    TEXT = "".join(f"line {number} of a text\n" for number in range(20_000))

    @pytest.mark.parametrize("suffix", [".txt.zst", ".md.zst", ".txt.gz"])
    def test_gives_the_same_pieces_as_the_plain_file(self, tmp_path, suffix):
        pack = gzip.compress if suffix.endswith("gz") else zstandard.ZstdCompressor().compress
        (tmp_path / f"a{suffix}").write_bytes(pack(self.TEXT.encode()))
        (tmp_path / "plain.txt").write_text(self.TEXT)
        packed, plain = find_files([str(tmp_path / f"a{suffix}"), str(tmp_path / "plain.txt")])
        assert list(read_pieces(packed, "text")) == list(read_pieces(plain, "text"))

    def test_several_and_skippable_frames(self, tmp_path):
        compress = zstandard.ZstdCompressor().compress
        skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"12345"
        data = skippable + compress(b"one ") + compress(b"") + skippable + compress(b"two")
        (tmp_path / "x.txt.zst").write_bytes(data)
        (tmp_path / "y.txt.gz").write_bytes(gzip.compress(b"three ") + gzip.compress(b"four"))
        assert documents(str(tmp_path)) == ["one two", "three four"]

    @pytest.mark.parametrize("suffix", [".zst", ".gz"])
    @pytest.mark.parametrize("what", ["cut", "flipped", "garbage behind"])
    def test_damage_is_refused(self, tmp_path, suffix, what):
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        pack = gzip.compress if suffix == ".gz" else compressor.compress
        data = bytearray(pack(self.TEXT.encode()))
        if what == "cut":
            del data[len(data) // 2 :]
        elif what == "flipped":
            data[len(data) // 2] ^= 1
        else:
            data += b"garbage"
        (tmp_path / f"x.txt{suffix}").write_bytes(data)
        assert f"x.txt{suffix}" in refused(str(tmp_path))

    def test_a_huge_window_is_refused(self, tmp_path):
        options = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
        compressor = zstandard.ZstdCompressor(compression_params=options).compressobj()
        data = compressor.compress(b"x" * 1000) + compressor.flush()
        (tmp_path / "x.txt.zst").write_bytes(data)
        assert "memory" in refused(str(tmp_path))


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class TestJsonl:
    def test_a_line_is_a_document(self, tmp_path):
        source = write_jsonl(
            tmp_path / "x.jsonl", {"text": "a\nb"}, {"text": ""}, {"n": 1, "text": "é😀"}
        )
        Path(source).write_text("\ufeff" + Path(source).read_text() + "\r\n  \n" + '{"text":"z"}')
        assert documents(source) == ["a\nb", "é😀", "z"]

    def test_another_field(self, tmp_path):
        source = write_jsonl(tmp_path / "x.jsonl", {"body": "b", "text": "t"})
        assert documents(source, "body") == ["b"]

    def test_compressed(self, tmp_path):
        lines = b"".join(b'{"text": "%d"}\n' % number for number in range(5000))
        (tmp_path / "x.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
        assert documents(str(tmp_path)) == [str(number) for number in range(5000)]

    @pytest.mark.parametrize(
        ("line", "part"),
        [
            ('{"body": "b", "id": 1}', "has the fields 'body', 'id'"),
            ("{}", "has the fields none"),
            ("[1]", "JSON list"),
            ("null", "JSON null"),
            ('{"text": 5}', "holds a number"),
            ('{"text": null}', "holds a null"),
            ('{"text": ["a"]}', "holds a list"),
            ('{"text": "half', "is not JSON"),
            ("{'text': 'x'}", "is not JSON"),
            ('{"text": "\\ud83d"}', "surrogate"),
            ('{"text": "a", "n": ' + "9" * 5000 + "}", "is not JSON"),
            ("[" * 100_000, "is not JSON"),
        ],
    )
    def test_a_bad_line_is_refused_with_its_number(self, tmp_path, line, part):
        (tmp_path / "x.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
        message = refused(str(tmp_path))
        assert part in message
        assert "x.jsonl', line 3" in message
        assert len(message) < 1000

    def test_broken_utf8_is_refused_with_its_line(self, tmp_path):
        (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
        assert "line 2 is not UTF-8" in refused(str(tmp_path))

    def test_a_line_without_end_is_refused_before_it_fills_the_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text_sources, "MAX_LINE_BYTES", 2 << 20)
        compressor = zstandard.ZstdCompressor().compressobj()
        with (tmp_path / "x.jsonl.zst").open("wb") as file:
            file.write(compressor.compress(b'{"text": "ok"}\n'))
            for _ in range(64):
                file.write(compressor.compress(bytes(8 << 20)))
            file.write(compressor.flush())
        tracemalloc.start()
        try:
            message = refused(str(tmp_path))
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert "x.jsonl.zst', line 2 is longer than 2 MiB" in message
        assert peak_bytes < 160 << 20, "512 MiB of hostile line must not be held"


class TestParquet:
    def write(self, folder, columns, **options):
        pq.write_table(pa.table(columns), folder / "x.parquet", **options)
        return str(folder / "x.parquet")

    @pytest.mark.parametrize(
        "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    )
    def test_a_row_is_a_document(self, tmp_path, kind):
        texts = [f"text {number} é" for number in range(100)]
        column = pa.array([*texts, ""], pa.string()).cast(kind)
        source = self.write(tmp_path, {"id": list(range(101)), "body": column}, row_group_size=30)
        assert documents(source, "body") == texts

    def test_a_wrong_column_is_refused_with_those_there_are(self, tmp_path):
        source = self.write(tmp_path, {"body": ["a"], "id": [1]})
        assert "has the columns 'body', 'id'" in refused(source)
        assert "has the type int64" in refused(source, "id")

    def test_a_nested_column_is_refused(self, tmp_path):
        source = self.write(tmp_path, {"meta": [{"text": "a"}]})
        assert "has the columns 'meta'" in refused(source, "meta.text")
        assert "has the type struct" in refused(source, "meta")

    def test_a_null_is_refused_with_its_row(self, tmp_path):
        source = self.write(tmp_path, {"text": ["a", None]})
        assert "holds a null at" in (message := refused(source))
        assert "row 2" in message

    def test_broken_utf8_is_refused_with_its_row(self, tmp_path):
        broken = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
        source = self.write(tmp_path, {"text": broken})
        assert "row 2 is not UTF-8" in refused(source)

    @pytest.mark.parametrize("what", ["cut", "flipped"])
    def test_damage_is_refused(self, tmp_path, what):
        source = self.write(
            tmp_path, {"text": ["some text"] * 5000}, write_page_checksum=True, compression="zstd"
        )
        data = bytearray(Path(source).read_bytes())
        if what == "cut":
            del data[len(data) // 2 :]
        else:
            data[:] = data[:8] + bytes(40) + data[48:]
        Path(source).write_bytes(data)
        assert "x.parquet" in refused(source)
