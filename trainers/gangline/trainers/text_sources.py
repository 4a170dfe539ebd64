"""Read documents from files as pieces of valid UTF-8, in memory that does not grow with the file.

A document comes as pieces of at most PIECE_BYTES, cut behind a newline where there is one, so that
one huge file is as good as many small ones. The cut depends on the text alone, never on how the
file was read or compressed. Nothing in the text is changed but for a byte order mark at the start
of a file, which is dropped; documents without text are passed over.

Bounds: a line of JSONL at most MAX_LINE_BYTES, a zstd window at most MAX_WINDOW_BYTES; a Parquet
file costs its reader about one page of the text column and READ_ROWS documents.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, cast

from gangline.trainers.data_errors import DataError
from gangline.trainers.python_docs import python_docs_documents, python_docs_files
from gangline.trainers.source_files import Format, SourceFile

PIECE_BYTES = 64 << 10
MAX_LINE_BYTES = 32 << 20
MAX_WINDOW_BYTES = 128 << 20  # what `zstd --long` asks for
READ_ROWS = 32

_READ_BYTES = 1 << 18
# A zstd block of 4 bytes may stand for 128 KiB: 2 KiB of a hostile file give 64 MiB at most.
_ZSTD_READ_BYTES = 2048
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Piece(NamedTuple):
    """Hold a part of a document."""

    text: bytes  # valid UTF-8, 1 to PIECE_BYTES bytes
    ends_document: bool


def read_pieces(file: SourceFile, text_field: str) -> Iterator[Piece]:
    """Give the documents of one file, in order.

    Raises: DataError that names the file, and where it can the line or row, for text that is not
        UTF-8, a damaged or cut compressed stream, a line too long, and a field that is missing or
        holds no string.
    """
    match file.format:
        case Format.PYTHON_DOCS:
            for text in python_docs_documents(python_docs_files()):
                yield from _cut([text.encode()])
        case Format.TEXT:
            yield from _read_text(file)
        case Format.JSONL:
            yield from _read_jsonl(file, text_field)
        case Format.PARQUET:
            yield from _read_parquet(file, text_field)


def _cut(chunks: Iterable[bytes]) -> Iterator[Piece]:
    """Cut one document into pieces; the rule sees only the text, not the chunks."""
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > PIECE_BYTES:
            end = buffer.rfind(b"\n", 0, PIECE_BYTES) + 1
            if end == 0:
                end = PIECE_BYTES
                # Step back to the first byte of a character: at most 3 continuation bytes.
                while buffer[end] & 0xC0 == 0x80 and end > PIECE_BYTES - 3:
                    end -= 1
            yield Piece(bytes(buffer[:end]), ends_document=False)
            del buffer[:end]
    if buffer:
        yield Piece(bytes(buffer), ends_document=True)


def _read_text(file: SourceFile) -> Iterator[Piece]:
    num_lines = 0
    with _opened(file) as stream:
        for piece in _cut(_chunks(stream)):
            try:
                piece.text.decode()
            except UnicodeDecodeError as error:
                line = num_lines + piece.text.count(b"\n", 0, error.start) + 1
                raise _not_utf8(f"{file.path!r}, line {line}", error) from error
            num_lines += piece.text.count(b"\n")
            yield piece


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    yield stream.read(_READ_BYTES).removeprefix(_BYTE_ORDER_MARK)
    while chunk := stream.read(_READ_BYTES):
        yield chunk


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Piece]:
    number = 0
    with _opened(file) as stream:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"data.source: {file.path!r}, line {number} is longer than "
                    f"{MAX_LINE_BYTES >> 20} MiB; wanted one JSON object a line; split the "
                    "document, or give it as Parquet or as a text file"
                )
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield from _cut([_text_of_line(line, f"{file.path!r}, line {number}", text_field)])


def _text_of_line(line: bytes, where: str, text_field: str) -> bytes:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"data.source: {where} is not JSON: {error}; wanted one object a line, such as "
            f'{{"{text_field}": "..."}}; correct the line or remove it'
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"data.source: {where} holds a JSON {_json_type(record)}; wanted an object with the "
            f"field {text_field!r}; correct the line or remove it"
        )
    if text_field not in record:
        raise _no_field(where, "fields", sorted(record), text_field)
    return _encoded(record[text_field], where, text_field)


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Piece]:
    # Here, since it costs 0.3 s and only Parquet needs it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        # Without buffered pages the whole column of a row group would be held in memory.
        with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20) as table:
            _check_column(table.schema_arrow, file.path, text_field)
            for batch in table.iter_batches(READ_ROWS, columns=[text_field], use_threads=False):
                for value in batch.column(text_field):
                    row += 1
                    where = f"{file.path!r}, row {row}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise _not_utf8(where, error) from error
                    yield from _cut([_encoded(text, where, text_field)])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # The last: a column's name that is not UTF-8 (found by changing bytes at random).
        raise _damaged(file, error) from error


def _check_column(schema: Any, path: str, text_field: str) -> None:
    import pyarrow as pa

    if schema.names.count(text_field) != 1:
        raise _no_field(repr(path), "columns", schema.names, text_field)
    kind = schema.field(text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(
            f"data.text_field: column {text_field!r} of {path!r} has the type {kind}; wanted "
            "string; name the column that holds the text in data.text_field"
        )


def _encoded(value: object, where: str, text_field: str) -> bytes:
    if not isinstance(value, str):
        raise DataError(
            f"data.text_field: {text_field!r} holds a {_json_type(value)} at {where}; wanted a "
            "string; correct or remove it, or name another field in data.text_field"
        )
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"data.source: {where} has half of a surrogate pair at character {error.start}, "
            "which UTF-8 cannot hold; wanted whole characters; correct or remove it"
        ) from error


@contextmanager
def _opened(file: SourceFile) -> Iterator[BinaryIO]:
    """Open a text or JSONL file for reading, decompressed; name it in every error of reading."""
    try:
        with open(file.path, "rb") as raw:
            if file.compression == ".zst":
                yield cast(BinaryIO, io.BufferedReader(_ZstdStream(raw), _READ_BYTES))
            elif file.compression == ".gz":
                with gzip.open(raw) as stream:
                    yield cast(BinaryIO, stream)
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(file, error) from error


class _ZstdStream(io.RawIOBase):
    """Decompress frame after frame; unlike zstandard's own reader, notice a cut stream."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._zstd = zstandard
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = self._file.read(_ZSTD_READ_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise OSError("the zstd stream ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
            except self._zstd.ZstdError as error:
                raise OSError(str(error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"data.source: {where} is not UTF-8: {error.reason} (byte 0x{error.object[error.start]:02x}"
        "); wanted UTF-8 text; convert the file, for example with iconv, or leave it out"
    )


def _no_field(where: str, what: str, names: list[str], text_field: str) -> DataError:
    shown = ", ".join(repr(name[:40]) for name in names[:10]) or "none"
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return DataError(
        f"data.text_field is {text_field!r}, but {where} has the {what} {shown}{more}; set "
        "data.text_field to the one that holds the text"
    )


def _damaged(file: SourceFile, error: Exception) -> DataError:
    kind = f"{file.format.value} file" + (f" ({file.compression})" if file.compression else "")
    return DataError(
        f"data.source: {file.path!r} cannot be read as a {kind}: {error}; wanted a whole file "
        "that this user may read; make it anew, or leave it out of data.source"
    )


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
