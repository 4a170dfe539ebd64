"""What a manifest may say, and that nothing else is believed: mutations by hypothesis."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.trainers import commit_manifest
from gangline.trainers.commit_files import CorruptCheckpointError, FileRecord
from gangline.trainers.commit_layout import (
    DTYPE_BYTES,
    Chunk,
    TensorLayout,
    file_layouts,
    tiles_exactly,
)
from gangline.trainers.commit_manifest import Manifest, decode, encode, seal, unseal

FILE = Path("step-00000050/manifest.json")
A, B = "rank-00000-000.safetensors", "rank-00001-000.safetensors"


def sample_manifest() -> Manifest:
    tensors = {
        "experts": TensorLayout(
            "BF16", (4, 3), (Chunk((0, 0), (1, 3), A), Chunk((1, 0), (3, 3), B))
        ),
        "scale": TensorLayout("F64", (), (Chunk((), (), B),)),
        "empty": TensorLayout("I32", (0, 2), (Chunk((0, 0), (0, 2), A),)),
    }
    files = {
        name: FileRecord(len(f.header) + f.num_data_bytes, "ab" * 32)
        for name, f in file_layouts(tensors).items()
    }
    return Manifest(50, 3, 2, {"dp": 2}, "digest", 12.5, {"cursor": 800}, files, tensors)


SEALED = encode(sample_manifest())
FIELDS: dict[str, Any] = json.loads(unseal(SEALED, FILE))


def test_what_is_encoded_comes_back() -> None:
    assert decode(SEALED, FILE) == sample_manifest()


@given(st.data())
def test_a_changed_byte_is_always_seen(data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(SEALED) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != SEALED[position]))
    changed = bytearray(SEALED)
    changed[position] = value
    with pytest.raises(CorruptCheckpointError, match="its own digest"):
        decode(bytes(changed), FILE)


@given(st.integers(0, len(SEALED) - 1), st.binary(max_size=40))
def test_a_cut_or_longer_manifest_is_seen(length: int, tail: bytes) -> None:
    for changed in (SEALED[:length], SEALED[:length] + tail, SEALED + tail):
        if changed != SEALED:
            with pytest.raises(CorruptCheckpointError):
                decode(changed, FILE)


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 2**63, 10**40, 0.5, 1e308]),
    st.text(max_size=8),
    st.sampled_from(["/etc/passwd", "../x.safetensors", A, B, "U8", "F128"]),
    st.lists(st.integers(-2, 2**40), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [
        path for key, inner in items for path in [(*prefix, key), *paths_of(inner, (*prefix, key))]
    ]


@given(st.data())
def test_a_resealed_lie_is_refused_or_harmless(data: st.DataObject) -> None:
    """Change one field of a manifest and seal it again, as somebody would on purpose."""
    fields = json.loads(json.dumps(FIELDS))
    path = data.draw(st.sampled_from(paths_of(fields)))
    holder = fields
    for key in path[:-1]:
        holder = holder[key]
    action = data.draw(st.sampled_from(["replace", "delete", "duplicate"]))
    if action == "replace":
        holder[path[-1]] = data.draw(HOSTILE)
    elif action == "delete":
        del holder[path[-1]]
    elif isinstance(holder, list):
        holder.append(holder[path[-1]])
    else:
        holder[f"{path[-1]}'"] = holder[path[-1]]
    refusal: CorruptCheckpointError | None = None
    try:
        manifest = decode(seal(fields), FILE)
    except CorruptCheckpointError as error:
        refusal = error
    if refusal is not None:
        assert refusal.file == FILE
        assert len(refusal.reason) < 400
        return
    # Believed: then it is sound, whatever was changed.
    for tensor in manifest.tensors.values():
        assert covers_once(tensor.shape, tensor.chunks)
    for name, layout in file_layouts(manifest.tensors).items():
        assert "/" not in name
        assert manifest.files[name].num_bytes == len(layout.header) + layout.num_data_bytes
    assert manifest.step >= 0


def covers_once(shape: tuple[int, ...], chunks: tuple[Chunk, ...]) -> bool:
    count = np.zeros(shape, dtype=np.int64)
    for chunk in chunks:
        box = tuple(slice(o, o + s) for o, s in zip(chunk.offset, chunk.shape, strict=True))
        count[box] += 1
    return bool((count == 1).all())


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Chunk]]:
    """Draw a tiling, or a tiling with a box moved, dropped or doubled."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    sides = [list(itertools.pairwise(cut)) for cut in cuts]
    chunks = [
        Chunk(tuple(a for a, _ in cell), tuple(b - a for a, b in cell), A)
        for cell in itertools.product(*sides)
    ]
    for _ in range(draw(st.integers(0, 2))):
        victim = draw(st.integers(0, len(chunks) - 1)) if chunks else None
        if victim is None:
            break
        action = draw(st.sampled_from(["drop", "double", "move"]))
        old = chunks[victim]
        if action == "drop":
            chunks.pop(victim)
        elif action == "double":
            chunks.append(old)
        else:
            offset = tuple(
                draw(st.integers(0, n - s)) for n, s in zip(shape, old.shape, strict=True)
            )
            chunks[victim] = Chunk(offset, old.shape, A)
    return shape, chunks


@given(boxes())
def test_the_tiling_test_agrees_with_counting_every_element(
    drawn: tuple[tuple[int, ...], list[Chunk]],
) -> None:
    shape, chunks = drawn
    assert tiles_exactly(shape, chunks) == covers_once(shape, tuple(chunks))


def test_a_million_chunks_are_checked_in_linear_time() -> None:
    # As many as a hostile manifest may have, in the order that is worst for a sweep.
    chunks = [Chunk((i, 0), (1, 4), A) for i in range(1 << 16)]
    assert tiles_exactly((1 << 16, 4), chunks)
    assert not tiles_exactly((1 << 16, 4), chunks[:-1])


def change(path: str, value: Any) -> bytes:
    """Seal the sample with one field changed; `/` parts the keys, `~` stands for one inside."""
    fields = json.loads(json.dumps(FIELDS))
    holder, *rest = fields, *(key.replace("~", "/") for key in path.split("/"))
    for key in rest[:-1]:
        holder = holder[int(key) if isinstance(holder, list) else key]
    holder[int(rest[-1]) if isinstance(holder, list) else rest[-1]] = value
    return seal(fields)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("step", True, "step is not a whole number"),
        ("step", 2.0, "step is not a whole number"),
        ("generation", -1, "generation is not a whole number"),
        ("version", 2, "this program reads"),
        ("format", "zip", "this program reads"),
        ("unknown", 1, "does not have exactly the fields"),
        ("axes", [], "axes is not an object"),
        ("created_at", "now", "created_at is not a number"),
        ("files/..~x", [1, "ab" * 32], "not the name of a data file"),
        (f"files/{A}", [1], "is not [bytes, sha256]"),
        (f"files/{A}", [8, "AB" * 32], "hexadecimal"),
        (f"files/{A}", [1 << 40, "ab" * 32], "its tensors need"),
        ("files/unused.safetensors", [0, "ab" * 32], "a file holds no tensor"),
        ("tensors/experts/dtype", "F128", "unknown dtype"),
        ("tensors/experts/dtype", "F64", "its tensors need"),
        ("tensors/experts/shape", [4], "another number of dims"),
        ("tensors/experts/shape", [5, 3], "overlap or leave a gap"),
        ("tensors/experts/shape", [1] * 9, "list of at most 8 numbers"),
        ("tensors/experts/chunks", [], "overlap or leave a gap"),
        ("tensors/experts/chunks", {}, "chunks is not a list"),
        ("tensors/experts/chunks/0", [A, [0, 0]], "is not [file, offset, shape]"),
        ("tensors/experts/chunks/0", ["/etc/passwd", [0, 0], [1, 3]], "not among the files"),
        ("tensors/experts/chunks/0", [A, [2, 0], [1, 3]], "overlap or leave a gap"),
        ("tensors/experts/chunks/0", [A, [4, 0], [1, 3]], "is outside of"),
        ("tensors/experts/chunks/0", [A, [0, 0], [0, 3]], "has an empty chunk"),
        ("tensors/empty/chunks", [], "needs exactly one chunk"),
        ("tensors/\u0000", {}, "not printable"),
    ],
)
def test_each_lie_is_refused_for_its_reason(path: str, value: Any, reason: str) -> None:
    with pytest.raises(CorruptCheckpointError) as caught:
        decode(change(path, value), FILE)
    assert reason in caught.value.reason
    assert str(FILE) in str(caught.value)


def raw(body: bytes) -> bytes:
    return commit_manifest._seal(body)


BODY = unseal(SEALED, FILE)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (BODY.replace(b'"step":50', b'"step":50,"step":60'), "the key 'step' twice"),
        (BODY.replace(b'"created_at":12.5', b'"created_at":NaN'), "the number NaN"),
        (BODY.replace(b'"created_at":12.5', b'"created_at":1e999'), "the number 1e999"),
        (BODY.replace(b'"step":50', b'"step":' + b"9" * 5000), "not acceptable JSON"),
        (BODY.replace(b'{"cursor":800}', b'{"x":' * 100_000 + b"1" + b"}" * 100_000), "deep"),
        (b"\xff" + BODY, "not acceptable JSON"),
        (b"[]", "does not have exactly the fields"),
        (b"", "not acceptable JSON"),
    ],
)
def test_json_that_is_not_what_it_seems_is_refused(body: bytes, reason: str) -> None:
    assert body != BODY
    with pytest.raises(CorruptCheckpointError) as caught:
        decode(raw(body), FILE)
    assert reason in caught.value.reason


def test_chunks_are_aligned_to_their_elements() -> None:
    layouts = file_layouts(sample_manifest().tensors)
    for layout in layouts.values():
        assert len(layout.header) % 8 == 0
        for entry in layout.entries:
            tensor = sample_manifest().tensors[entry.name]
            element_bytes = DTYPE_BYTES[tensor.dtype]
            assert entry.start % element_bytes == 0
            assert entry.stop - entry.start == element_bytes * math.prod(entry.chunk.shape)
