"""The layout of a checkpoint: which box of which tensor lies where in which file.

A safetensors file follows from the chunks that lie in it, to the byte: `file_layouts` is the one
function that the writer and the reader share, so that a header is compared and never parsed.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# The names of safetensors, with the bytes of one element.
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """Place a box of a tensor in a file."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class TensorLayout:
    """Describe a tensor and the chunks that tile it."""

    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class FileEntry:
    """Place one chunk in the data part of its file."""

    name: str  # of the tensor
    chunk: Chunk
    start: int  # bytes from the end of the header
    stop: int


@dataclass(frozen=True)
class FileLayout:
    """Lay out one safetensors file: the exact header, and where each chunk lies behind it."""

    file: str
    header: bytes
    entries: tuple[FileEntry, ...]
    num_data_bytes: int


def file_layouts(tensors: Mapping[str, TensorLayout]) -> dict[str, FileLayout]:
    """Lay out every file that `tensors` mentions.

    Wide elements come first, so that every chunk is aligned to its own element in a buffer that
    holds the whole data part; then by name and offset. Writer and reader share this one function.
    """
    by_file: dict[str, list[tuple[int, str, Chunk]]] = defaultdict(list)
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            by_file[chunk.file].append((DTYPE_BYTES[tensor.dtype], name, chunk))
    layouts = {}
    for file, placed in by_file.items():
        placed.sort(key=lambda item: (-item[0], item[1], item[2].offset))
        entries, position = [], 0
        header: dict[str, Any] = {}
        for element_bytes, name, chunk in placed:
            stop = position + element_bytes * math.prod(chunk.shape)
            tensor = tensors[name]
            header[chunk_key(name, chunk, tensor.shape)] = {
                "dtype": tensor.dtype,
                "shape": list(chunk.shape),
                "data_offsets": [position, stop],
            }
            entries.append(FileEntry(name, chunk, position, stop))
            position = stop
        layouts[file] = FileLayout(file, _safetensors_header(header), tuple(entries), position)
    return layouts


def chunk_key(name: str, chunk: Chunk, shape: tuple[int, ...]) -> str:
    """Name a chunk inside its file: the tensor's name, and the box where it is not the whole."""
    if chunk.shape == shape:
        return name
    box = ",".join(f"{o}:{o + s}" for o, s in zip(chunk.offset, chunk.shape, strict=True))
    return f"{name}[{box}]"


def _safetensors_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tiles_exactly(shape: tuple[int, ...], chunks: Iterable[Chunk]) -> bool:
    """Tell whether `chunks` cover a box of `shape` once everywhere, without comparing pairs.

    A box is determined by its 2^d corners with alternating signs (the mixed difference of its
    indicator function), and so is a sum of boxes. The chunks tile the tensor exactly where the
    signed corners of all chunks, less those of the whole, cancel. Linear in the number of chunks,
    where a hostile manifest would make the comparison of pairs quadratic.
    """
    balance: dict[tuple[int, ...], int] = defaultdict(int)
    boxes = [((0,) * len(shape), shape, -1)]
    boxes += [(chunk.offset, chunk.shape, 1) for chunk in chunks]
    for offset, size, weight in boxes:
        sides = [((o, 1), (o + s, -1)) for o, s in zip(offset, size, strict=True)]
        for corner in itertools.product(*sides):
            sign = math.prod(sign for _, sign in corner)
            balance[tuple(place for place, _ in corner)] += weight * sign
    return not any(balance.values())
