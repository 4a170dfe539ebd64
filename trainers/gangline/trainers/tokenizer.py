"""Turn text into token ids and back.

Two kinds: "bytes" (256 byte values and an end-of-document token, nothing to install or to train)
and the JSON file of a Hugging Face `tokenizers` tokenizer. A special token's name inside a document
is encoded as ordinary text, so that no document can forge its own end. (A word-level model whose
plain vocabulary holds that very name still can.)
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gangline.trainers.data_errors import DataError

BYTES = "bytes"
MAX_TOKENIZER_BYTES = 256 << 20

# What the published tokenizers call the token that ends a document.
_END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 - as DeepSeek spells it
)


class Tokenizer(Protocol):
    """Encode and decode; `digest` tells apart any two that encode differently."""

    digest: str
    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text, without an end-of-document token."""
        ...

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[NDArray[Any]]:
        """Give the ids of several pieces of valid UTF-8, each encoded by itself."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of ids; end-of-document tokens vanish, broken UTF-8 shows as U+FFFD."""
        ...


class ByteTokenizer:
    """Take each byte of the UTF-8 text as a token; 256 ends a document."""

    digest = hashlib.sha256(b"bytes 1: 256 byte values, eos 256").hexdigest()
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[NDArray[Any]]:
        return [np.frombuffer(piece, dtype=np.uint8) for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        return bytes(token for token in ids if token != self.eos_id).decode(errors="replace")


class JsonTokenizer:
    """Wrap a tokenizer of the `tokenizers` library."""

    def __init__(self, path: str) -> None:
        data = _read_tokenizer_file(path)
        self.digest = hashlib.sha256(data).hexdigest()
        self._tokenizer = _parse_tokenizer(path, data)
        # A file saved for fine-tuning may cut or fill every text to a fixed length.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Otherwise a document that contains the end token's name would forge a boundary.
        self._tokenizer.encode_special_tokens = True
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        end = next((name for name in _END_TOKENS if name in ids), None)
        if end is None:
            raise DataError(
                f"data.tokenizer {path!r} has no end-of-document token; wanted one of "
                f"{', '.join(_END_TOKENS)}; add it as a special token to the file"
            )
        self.eos_id = ids[end]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[NDArray[Any]]:
        texts = [piece.decode() for piece in pieces]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        kept = [token for token in ids if token != self.eos_id]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer that `data.tokenizer` names: "bytes" or the path of a JSON file.

    Raises: DataError if the file is missing, too large, no tokenizer, or has no end token.
    """
    return ByteTokenizer() if spec == BYTES else JsonTokenizer(spec)


def _read_tokenizer_file(spec: str) -> bytes:
    path = Path(spec).expanduser()
    try:
        if not path.is_file():
            raise DataError(
                f"data.tokenizer {spec!r} is not a file (looked in {str(Path.cwd())!r}); wanted "
                f"{BYTES!r} or the path of a tokenizer.json; correct data.tokenizer"
            )
        with path.open("rb") as file:
            data = file.read(MAX_TOKENIZER_BYTES + 1)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(
            f"data.tokenizer {spec!r} cannot be read: {error}; wanted the path of a "
            "tokenizer.json; correct data.tokenizer or the permissions"
        ) from error
    if len(data) > MAX_TOKENIZER_BYTES:
        raise DataError(
            f"data.tokenizer {spec!r} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB; wanted a "
            "tokenizer.json; correct data.tokenizer"
        )
    return data


def _parse_tokenizer(spec: str, data: bytes) -> Any:
    # Here, since "bytes" does without the library.
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises no narrower type
        raise DataError(
            f"data.tokenizer {spec!r} is not a tokenizer of the `tokenizers` library: {error}; "
            f"wanted a tokenizer.json; correct data.tokenizer, or use {BYTES!r}"
        ) from error


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise DataError(
                f"token id {token} is outside the vocabulary of {vocab_size}; wanted ids that "
                "the same tokenizer made; load the tokenizer that the dataset names"
            )
