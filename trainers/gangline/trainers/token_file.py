"""Keep the tokens of a dataset in one file that any number of processes map into memory.

Layout, little-endian, each part at a multiple of ALIGNMENT bytes:
    header    magic (8), SHA-256 of the JSON (32), length of the JSON (4), JSON, zeros
    tokens    uint16 if the vocabulary fits, else uint32; an end-of-document token behind each
              document
    checks    CRC-32 of each BLOCK_BYTES of the tokens (the last block may be shorter)

What is noticed when: opening compares the header with its own digest and the file's size with the
header, in constant time; each block is compared with its CRC-32 when a process first reads from
it; `verify` reads all tokens and compares their SHA-256.
"""

import hashlib
import json
import os
import struct
import zlib
from array import array
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from gangline.trainers.data_errors import TokenFileError

MAGIC = b"GLTOKENS"
# Also counts changes of how text is cut and encoded: it goes into the digest of every dataset.
FORMAT_VERSION = 1
ALIGNMENT = 4096
# Room for the longest path of a tokenizer, written in JSON escapes.
HEADER_BYTES = 8 * ALIGNMENT
BLOCK_BYTES = 16 << 10

_PREFIX = struct.Struct("<8s32sI")
_MEND = "remove the file and start the run again with its data.source, so that it is made anew"


@dataclass(frozen=True)
class DatasetInfo:
    """Describe a prepared dataset; all that a worker needs to open it, without its sources."""

    path: str  # of the token file
    digest: str  # SHA-256 over format version, tokenizer and text: the identity of the dataset
    num_tokens: int  # end-of-document tokens included
    num_documents: int
    num_bytes: int  # of UTF-8 text
    vocab_size: int
    tokenizer: str  # as data.tokenizer named it
    eos_id: int

    def to_json(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` gave.

        Raises: TokenFileError for missing, unknown or wrongly typed fields.
        """
        kinds = {field.name: field.type for field in fields(cls)}
        wrong = sorted(set(kinds) ^ set(values)) or sorted(
            name for name, kind in kinds.items() if type(values[name]) is not kind
        )
        if wrong:
            raise TokenFileError(
                f"a dataset's description has missing, unknown or wrong fields: {', '.join(wrong)}"
                "; wanted what prepare_dataset gave; prepare the dataset again"
            )
        return cls(**values)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Choose the narrowest type of a token."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class TokenFileWriter:
    """Write a token file under a provisional name; the header comes last.

    Guarantees: until `finish` has returned, the file is not a token file and is refused.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.num_tokens = 0
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._sha = hashlib.sha256()
        self._checks = array("I")
        self._block = bytearray()
        self._file: BinaryIO = path.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, ids: NDArray[Any]) -> None:
        """Append tokens.

        Shapes: [N], any integer type; each below vocab_size.
        """
        data = ids.astype(self._dtype).tobytes()
        self.num_tokens += ids.size
        self._sha.update(data)
        self._file.write(data)
        self._block += data
        whole = len(self._block) - len(self._block) % BLOCK_BYTES
        with memoryview(self._block) as blocks:
            for start in range(0, whole, BLOCK_BYTES):
                self._checks.append(zlib.crc32(blocks[start : start + BLOCK_BYTES]))
        del self._block[:whole]

    def finish(
        self, *, digest: str, num_documents: int, num_bytes: int, tokenizer: str, eos_id: int
    ) -> None:
        """Write checks and header, and bring everything to the disk."""
        if self._block:
            self._checks.append(zlib.crc32(self._block))
        tokens_bytes = self.num_tokens * self._dtype.itemsize
        self._file.write(bytes(_aligned(tokens_bytes) - tokens_bytes))
        self._file.write(np.array(self._checks, dtype="<u4").tobytes())
        info = DatasetInfo(
            "",
            digest,
            self.num_tokens,
            num_documents,
            num_bytes,
            self._vocab_size,
            tokenizer,
            eos_id,
        )
        content = info.to_json() | {
            "version": FORMAT_VERSION,
            "tokens_sha256": self._sha.hexdigest(),
        }
        del content["path"]
        text = json.dumps(content, sort_keys=True).encode()
        assert _PREFIX.size + len(text) <= HEADER_BYTES, "the header has room for any path"
        self._file.seek(0)
        self._file.write(_PREFIX.pack(MAGIC, hashlib.sha256(text).digest(), len(text)) + text)
        self._file.flush()
        os.fsync(self._file.fileno())


def read_info(path: Path) -> DatasetInfo:
    """Describe the dataset in a token file from its header alone.

    Raises: TokenFileError if the file is missing, no token file, of another version, altered in
        its header, or not of the length that the header asks for.
    """
    return _read_header(path)[0]


def verify(info: DatasetInfo) -> None:
    """Read the whole file and compare every token with the digest taken when it was written.

    Raises: TokenFileError, naming the file.
    """
    TokenFile(info).verify()


class TokenFile:
    """Read tokens from a mapped file, checking each block on its first use."""

    def __init__(self, info: DatasetInfo) -> None:
        self.info = info
        header, self._tokens_sha256 = _read_header(Path(info.path))
        _check_identity(info, header)
        dtype = token_dtype(info.vocab_size)
        size = info.num_tokens * dtype.itemsize
        # np.memmap's own class makes each slice ten times slower than a plain array's.
        self._bytes = np.memmap(info.path, np.uint8, "r", HEADER_BYTES, (size,)).view(np.ndarray)
        self._tokens = self._bytes.view(dtype)
        self._checks = np.memmap(
            info.path, "<u4", "r", HEADER_BYTES + _aligned(size), (_num_blocks(size),)
        ).view(np.ndarray)
        self._checked = bytearray(_num_blocks(size))

    def read(self, first: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with the tokens from `first` on.

        Raises: TokenFileError if a block that they lie in has been altered.
        """
        last = first + out.size
        assert 0 <= first < last <= self.info.num_tokens, f"tokens {first} to {last} do not exist"
        self._check(first * self._tokens.itemsize, last * self._tokens.itemsize)
        out[:] = self._tokens[first:last]

    def verify(self) -> None:
        """Check every block, and all tokens against the digest in the header.

        Raises: TokenFileError, naming the file.
        """
        self._check(0, self._bytes.size)
        got = hashlib.sha256(self._bytes.data).hexdigest()
        if got != self._tokens_sha256:
            raise TokenFileError(
                f"the tokens of {self.info.path!r} have been altered: their SHA-256 is {got}, "
                f"wanted {self._tokens_sha256}; {_MEND}"
            )

    def _check(self, first: int, last: int) -> None:
        for block in range(first // BLOCK_BYTES, (last - 1) // BLOCK_BYTES + 1):
            if self._checked[block]:
                continue
            start = block * BLOCK_BYTES
            got = zlib.crc32(self._bytes.data[start : start + BLOCK_BYTES])
            if got != self._checks[block]:
                raise TokenFileError(
                    f"{self.info.path!r} has been altered between bytes {HEADER_BYTES + start} "
                    f"and {HEADER_BYTES + start + BLOCK_BYTES}: their CRC-32 is {got:08x}, wanted "
                    f"{self._checks[block]:08x}; {_MEND}"
                )
            self._checked[block] = 1


def _read_header(path: Path) -> tuple[DatasetInfo, str]:
    """Give the description and the SHA-256 of the tokens."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise TokenFileError(
            f"the token file {str(path)!r} cannot be opened: {error.strerror}; wanted the file "
            "that prepare_dataset made; bring it back, or prepare the data again from data.source"
        ) from error
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise TokenFileError(
            f"{str(path)!r} ({size} bytes) is not a token file, or was cut short; {_MEND}"
        )
    _, wanted, length = _PREFIX.unpack_from(head)
    text = head[_PREFIX.size : _PREFIX.size + length]
    if hashlib.sha256(text).digest() != wanted:
        raise TokenFileError(f"the header of {str(path)!r} has been altered; {_MEND}")
    content = json.loads(text)
    if content.pop("version", None) != FORMAT_VERSION:
        raise TokenFileError(
            f"{str(path)!r} has another format version than {FORMAT_VERSION}; {_MEND}"
        )
    tokens_sha256 = content.pop("tokens_sha256", "")
    info = DatasetInfo.from_json(content | {"path": str(path)})
    tokens_bytes = info.num_tokens * token_dtype(info.vocab_size).itemsize
    whole = HEADER_BYTES + _aligned(tokens_bytes) + 4 * _num_blocks(tokens_bytes)
    if size != whole:
        raise TokenFileError(
            f"{str(path)!r} has {size} bytes, wanted {whole}: it was cut short or added to; {_MEND}"
        )
    return info, tokens_sha256


def _check_identity(info: DatasetInfo, header: DatasetInfo) -> None:
    # The name of the tokenizer may differ: the same file under another path gives the same digest.
    found = header.to_json() | {"tokenizer": info.tokenizer, "path": info.path}
    if found != info.to_json():
        raise TokenFileError(
            f"{info.path!r} holds dataset {header.digest}, wanted {info.digest} with the same "
            "counts; prepare the data again from data.source"
        )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)
