"""The manifest of a checkpoint: what is in it, in JSON, under a digest of its own.

::

    {"sha256":"<64 hex digits>","manifest":{...}}\\n

The digest covers the bytes of the inner object, and every other byte is fixed, so that a flip
anywhere in the file is seen. It guards against accidents; somebody who writes a checkpoint on
purpose can compute digests too. Against those, nothing is believed that was not checked: sizes,
counts, types, names, and that the chunks of each tensor tile it exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gangline.trainers.commit_files import CorruptCheckpointError, FileRecord
from gangline.trainers.commit_layout import (
    DTYPE_BYTES,
    Chunk,
    TensorLayout,
    chunk_key,
    file_layouts,
    tiles_exactly,
)

MANIFEST_NAME = "manifest.json"
FORMAT = "gangline-checkpoint"
VERSION = 1

# Far above any real checkpoint, far below what a hostile one could cost: 64 MiB of JSON parse in
# about a second here.
MAX_MANIFEST_BYTES = 64 << 20
MAX_FILES = 1 << 16
MAX_TENSORS = 1 << 18
MAX_CHUNKS = 1 << 20
MAX_DIMS = 8
MAX_NAME_CHARS = 512
MAX_COUNT = (1 << 63) - 1

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_HEAD = b'{"sha256":"'
_MIDDLE = b'","manifest":'
_TAIL = b"}\n"


@dataclass(frozen=True)
class Manifest:
    """Say everything about one committed step that is needed to trust and to load it."""

    step: int
    generation: int
    world_size: int
    axes: dict[str, int]  # mesh axis -> number of ranks along it
    config_digest: str
    created_at: float  # unix_s, for people; nothing is decided by it
    extra: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, TensorLayout]


def tensors_to_json(tensors: Mapping[str, TensorLayout]) -> str:
    """Encode the part of a manifest that stays the same from step to step."""
    return _dump(
        {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "chunks": [[c.file, c.offset, c.shape] for c in tensor.chunks],
            }
            for name, tensor in tensors.items()
        }
    )


def encode(manifest: Manifest, *, tensors_json: str | None = None) -> bytes:
    """Encode a manifest under its digest; `tensors_json` saves encoding the tensors again."""
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "generation": manifest.generation,
        "world_size": manifest.world_size,
        "axes": manifest.axes,
        "config_digest": manifest.config_digest,
        "created_at": manifest.created_at,
        "extra": manifest.extra,
        "files": {name: [r.num_bytes, r.sha256] for name, r in manifest.files.items()},
    }
    tensors_json = tensors_json or tensors_to_json(manifest.tensors)
    return _seal(f'{_dump(fields)[:-1]},"tensors":{tensors_json}}}'.encode())


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def unseal(data: bytes, file: Path) -> bytes:
    """Return the inner object of a sealed JSON file, or raise that its digest does not fit."""
    start = len(_HEAD) + 64 + len(_MIDDLE)
    body = data[start : -len(_TAIL)]
    digest = hashlib.sha256(body).hexdigest().encode()
    if data != b"".join((_HEAD, digest, _MIDDLE, body, _TAIL)):
        raise CorruptCheckpointError(file, "its own digest does not fit its content")
    return body


def seal(value: object) -> bytes:
    """Encode any JSON value under a digest, in the form that `unseal` takes."""
    return _seal(_dump(value).encode())


def _seal(body: bytes) -> bytes:
    return b"".join((_HEAD, hashlib.sha256(body).hexdigest().encode(), _MIDDLE, body, _TAIL))


def load_json(body: bytes, file: Path) -> Any:
    """Parse JSON without its surprises: no duplicate key, NaN, infinity or bottomless nesting."""

    def refuse_constant(text: str) -> NoReturn:
        raise ValueError(f"the number {text}")

    def finite(text: str) -> float:
        if math.isinf(number := float(text)):
            raise ValueError(f"the number {text[:32]}")
        return number

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise ValueError(f"the key {counts.most_common(1)[0][0][:64]!r} twice")
        return result

    try:
        return json.loads(
            body.decode("utf-8"),
            object_pairs_hook=refuse_duplicates,
            parse_constant=refuse_constant,
            parse_float=finite,
        )
    except RecursionError as error:
        raise CorruptCheckpointError(file, "nested too deeply") from error
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise CorruptCheckpointError(file, f"not acceptable JSON: {error}") from error


def decode(data: bytes, file: Path) -> Manifest:
    """Decode and check a manifest.

    Raises: CorruptCheckpointError naming `file` and the first thing that cannot be believed.
    Guarantees: what is returned tiles every tensor exactly, names files without a folder in them,
    and gives each file the size that its layout needs.
    """
    fields = load_json(unseal(data, file), file)
    return _Checker(file).manifest(fields)


class _Checker:
    """Check a decoded manifest field by field, with the path of the field in every refusal."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def refuse(self, reason: str) -> NoReturn:
        raise CorruptCheckpointError(self._file, reason)

    def manifest(self, fields: Any) -> Manifest:
        self.keys(fields, "manifest", {
            "format", "version", "step", "generation", "world_size", "axes", "config_digest",
            "created_at", "extra", "files", "tensors",
        })  # fmt: skip
        if fields["format"] != FORMAT or fields["version"] != VERSION:
            self.refuse(
                f"format {str(fields['format'])[:32]!r} version {str(fields['version'])[:8]}, "
                f"this program reads {FORMAT!r} version {VERSION}"
            )
        axes = self.object(fields["axes"], "axes", max_items=16)
        created_at = fields["created_at"]
        if isinstance(created_at, bool) or not isinstance(created_at, int | float):
            self.refuse("created_at is not a number")
        files = {
            self.file_name(name): self.file_record(record, f"files[{name[:64]!r}]")
            for name, record in self.object(fields["files"], "files", max_items=MAX_FILES).items()
        }
        manifest = Manifest(
            step=self.count(fields["step"], "step"),
            generation=self.count(fields["generation"], "generation"),
            world_size=self.count(fields["world_size"], "world_size"),
            axes={self.name(axis): self.count(size, "axes") for axis, size in axes.items()},
            config_digest=self.text(fields["config_digest"], "config_digest"),
            created_at=float(created_at),
            extra=self.object(fields["extra"], "extra", max_items=MAX_TENSORS),
            files=files,
            tensors=self.tensors(fields["tensors"], files),
        )
        self.file_sizes(manifest)
        return manifest

    def tensors(self, value: Any, files: Mapping[str, FileRecord]) -> dict[str, TensorLayout]:
        tensors = {}
        num_chunks = 0
        for name, fields in self.object(value, "tensors", max_items=MAX_TENSORS).items():
            where = f"tensor {self.name(name)!r}"
            self.keys(fields, where, {"dtype", "shape", "chunks"})
            dtype, shape = fields["dtype"], self.sizes(fields["shape"], where)
            if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
                self.refuse(f"{where} has the unknown dtype {str(dtype)[:32]!r}")
            if not isinstance(fields["chunks"], list):
                self.refuse(f"{where}: chunks is not a list")
            num_chunks += len(fields["chunks"])
            if num_chunks > MAX_CHUNKS:
                self.refuse(f"more than {MAX_CHUNKS} chunks")
            chunks = tuple(self.chunk(chunk, shape, files, where) for chunk in fields["chunks"])
            self.tiling(shape, chunks, where)
            tensors[name] = TensorLayout(dtype, shape, chunks)
        return tensors

    def tiling(self, shape: tuple[int, ...], chunks: tuple[Chunk, ...], where: str) -> None:
        if math.prod(shape) == 0:
            if [chunk.shape for chunk in chunks] != [shape]:
                self.refuse(f"{where} is empty, and needs exactly one chunk")
        elif any(math.prod(chunk.shape) == 0 for chunk in chunks):
            self.refuse(f"{where} has an empty chunk")
        elif not tiles_exactly(shape, chunks):
            self.refuse(f"the chunks of {where} overlap or leave a gap")

    def chunk(
        self, value: Any, shape: tuple[int, ...], files: Mapping[str, FileRecord], where: str
    ) -> Chunk:
        if not isinstance(value, list) or len(value) != 3:
            self.refuse(f"{where}: a chunk is not [file, offset, shape]")
        file, offset, size = value[0], self.sizes(value[1], where), self.sizes(value[2], where)
        if not isinstance(file, str) or file not in files:
            self.refuse(f"{where} lies in {str(file)[:64]!r}, which is not among the files")
        if len(offset) != len(shape) or len(size) != len(shape):
            self.refuse(f"{where}: a chunk has another number of dims than the tensor")
        if any(o + s > whole for o, s, whole in zip(offset, size, shape, strict=True)):
            self.refuse(f"{where}: the chunk at {offset} of shape {size} is outside of {shape}")
        return Chunk(offset, size, file)

    def file_sizes(self, manifest: Manifest) -> None:
        layouts = file_layouts(manifest.tensors)
        if manifest.files.keys() != layouts.keys():
            self.refuse("a file holds no tensor")
        for name, layout in layouts.items():
            keys = {
                chunk_key(e.name, e.chunk, manifest.tensors[e.name].shape) for e in layout.entries
            }
            if len(keys) != len(layout.entries):
                self.refuse(f"two chunks have the same key in {name}")
            needed = len(layout.header) + layout.num_data_bytes
            if manifest.files[name].num_bytes != needed:
                got = manifest.files[name].num_bytes
                self.refuse(f"{name} is said to have {got} bytes, its tensors need {needed}")

    def keys(self, value: Any, where: str, wanted: set[str]) -> None:
        if not isinstance(value, dict) or value.keys() != wanted:
            self.refuse(f"{where} does not have exactly the fields {', '.join(sorted(wanted))}")

    def object(self, value: Any, where: str, *, max_items: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.refuse(f"{where} is not an object")
        if len(value) > max_items:
            self.refuse(f"{where} has {len(value)} entries, more than {max_items}")
        return value

    def count(self, value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            self.refuse(f"{where} is not a whole number from 0 to 2^63-1")
        return value

    def sizes(self, value: Any, where: str) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) > MAX_DIMS:
            self.refuse(f"{where}: a shape or offset is not a list of at most {MAX_DIMS} numbers")
        return tuple(self.count(item, where) for item in value)

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) > MAX_NAME_CHARS:
            self.refuse(f"{where} is not a text of at most {MAX_NAME_CHARS} characters")
        return value

    def name(self, value: str) -> str:
        if not 0 < len(value) <= MAX_NAME_CHARS or not value.isprintable():
            self.refuse(f"the name {value[:64]!r} is empty, too long or not printable")
        return value

    def file_name(self, value: str) -> str:
        if not _FILE_NAME.fullmatch(value):
            self.refuse(f"{value[:64]!r} is not the name of a data file")
        return value

    def file_record(self, value: Any, where: str) -> FileRecord:
        if not isinstance(value, list) or len(value) != 2:
            self.refuse(f"{where} is not [bytes, sha256]")
        num_bytes, sha256 = self.count(value[0], where), value[1]
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            self.refuse(f"{where}: the SHA-256 is not 64 lower-case hexadecimal digits")
        return FileRecord(num_bytes, sha256)
