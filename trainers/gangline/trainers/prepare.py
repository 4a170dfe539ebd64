"""Turn the sources into one token file in the cache, once, whoever asks and how often.

The file is named by its digest: SHA-256 over the format version, the tokenizer's digest, and
length and SHA-256 of each document in order. Text and tokens come from the same single reading.

A note beside it remembers which state of the source files (path, size, times, inode) gave which
digest, so that a second call reads no text. As git does with its index, the note is written only
if no file changed in the moments before the reading (SETTLE_S): a further change within the same
tick of the file system's clock would look like the state that was read.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from gangline.trainers.config import DataConfig
from gangline.trainers.data_errors import DataError, TokenFileError
from gangline.trainers.python_docs import python_docs_files
from gangline.trainers.source_files import Format, SourceFile, find_files
from gangline.trainers.text_sources import Piece, read_pieces
from gangline.trainers.token_file import FORMAT_VERSION, DatasetInfo, TokenFileWriter, read_info
from gangline.trainers.tokenizer import Tokenizer, load_tokenizer

Report = Callable[[str], None]

# The coarsest clock of a common file system (FAT) ticks every 2 s.
SETTLE_S = 2.0
_REPORT_EVERY_S = 2.0
_NOTES = "sources"  # folder of locks and notes in the cache
# Enough pieces to keep the cores of a host busy in `encode_batch`; more costs memory only.
_BATCH_BYTES = 2 << 20
_BATCH_PIECES = 4096


def _silent(message: str) -> None:
    pass


def prepare_dataset(config: DataConfig, cache_dir: Path, report: Report = _silent) -> DatasetInfo:
    """Tokenise the sources of `config` into `cache_dir`, or find that it has been done.

    Any number of processes may call this at once, also on machines that share the folder: one
    works, the others wait and take its result.

    Raises: DataError, naming the field of the job file, for what is wrong with sources, tokenizer
        or cache.
    Guarantees: the file appears whole and on disk, or not at all; what a killed call left behind
        is removed by the next one.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    files = find_files(config.source)
    state = _read_state(files, tokenizer, config.text_field)
    try:
        (cache_dir / _NOTES).mkdir(parents=True, exist_ok=True)
        info = _remembered(state, cache_dir, report)
        if info is None:
            info = _prepare_once(files, tokenizer, config, state, cache_dir, report)
    except OSError as error:  # one of a source has become a DataError where it was read
        raise DataError(
            f"the token cache {str(cache_dir)!r} cannot be used: {error}; wanted a folder with "
            "room for 2 bytes a token (4 with a vocabulary above 65,536); free some space or "
            "start the run in another folder"
        ) from error
    return replace(info, tokenizer=config.tokenizer)


@dataclass(frozen=True)
class _State:
    """Hold what tells one state of the sources from another."""

    key: str
    newest_change_s: float  # Unix time


def _read_state(files: Sequence[SourceFile], tokenizer: Tokenizer, text_field: str) -> _State:
    rows: list[list[Any]] = []
    newest_ns = 0
    for file in files:
        is_docs = file.format is Format.PYTHON_DOCS
        for path in python_docs_files() if is_docs else [Path(file.path)]:
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(
                    f"data.source: {str(path)!r} cannot be read: {error}; wanted a file that "
                    "this user may read; correct data.source or the permissions"
                ) from error
            times = status.st_mtime_ns, status.st_ctime_ns
            newest_ns = max(newest_ns, *times)
            rows.append([file.format.value, str(path.absolute()), status.st_size, *times])
            rows[-1].append(status.st_ino)
    content = [FORMAT_VERSION, tokenizer.digest, text_field, rows]
    return _State(hashlib.sha256(json.dumps(content).encode()).hexdigest(), newest_ns / 1e9)


def _prepare_once(
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    config: DataConfig,
    state: _State,
    cache_dir: Path,
    report: Report,
) -> DatasetInfo:
    notes = cache_dir / _NOTES
    with _locked(notes / f"{state.key}.lock", report):
        info = _remembered(state, cache_dir, report)  # another process may have been first
        if info is None:
            partial = cache_dir / f"{state.key}.partial"
            _remove_leftovers(cache_dir, keep=partial)
            started_s = time.time()
            info = _tokenise(files, tokenizer, config, partial, report)
            if state.newest_change_s < started_s - SETTLE_S:
                _write_note(notes / f"{state.key}.digest", info.digest)
    return info


def _remembered(state: _State, cache_dir: Path, report: Report) -> DatasetInfo | None:
    note = cache_dir / _NOTES / f"{state.key}.digest"
    if not note.exists():
        return None
    # The note is not synced: after a power cut it may be empty, and then names no file.
    path = cache_dir.absolute() / f"{note.read_bytes().hex()}.tokens"
    if not path.exists():
        return None
    try:
        return read_info(path)
    except TokenFileError as error:
        report(f"preparing the data again, since {error}")
        return None


def _write_note(note: Path, digest: str) -> None:
    partial = note.with_suffix(".partial")
    partial.write_bytes(bytes.fromhex(digest))
    os.replace(partial, note)


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=_REPORT_EVERY_S)
            break
        except Timeout:
            report("waiting for another process that is preparing the same data")
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(cache_dir: Path, *, keep: Path) -> None:
    """Remove what killed processes left: a partial file whose lock nobody holds."""
    for partial in cache_dir.glob("*.partial"):
        if partial == keep:
            continue  # ours: the lock is held by this very process
        lock = FileLock(cache_dir / _NOTES / f"{partial.stem}.lock")
        try:
            with lock.acquire(timeout=0):
                partial.unlink(missing_ok=True)
        except Timeout:
            continue


def _tokenise(
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    config: DataConfig,
    partial: Path,
    report: Report,
) -> DatasetInfo:
    """Read, hash, encode and write in one pass; then give the file its name."""
    progress = _Progress(len(files), report)
    text = _TextDigest(tokenizer.digest)
    try:
        with TokenFileWriter(partial, tokenizer.vocab_size) as writer:
            pieces = _read_all(files, config.text_field, progress)
            for batch in _batches(pieces):
                for piece in batch:
                    text.update(piece)
                writer.write(_encode(batch, tokenizer))
                progress.update(text.num_bytes)
            if text.num_documents == 0:
                raise DataError(
                    f"data.source {config.source!r} holds no text: {len(files)} files were read, "
                    "all empty; wanted at least one document; name other files in data.source"
                )
            writer.finish(
                digest=text.hexdigest(),
                num_documents=text.num_documents,
                num_bytes=text.num_bytes,
                tokenizer=config.tokenizer,
                eos_id=tokenizer.eos_id,
            )
        # Over an older file of that name, too: it holds the same tokens, or it is damaged.
        path = partial.absolute().with_name(f"{text.hexdigest()}.tokens")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    info = read_info(path)
    report(
        f"prepared {info.num_tokens:,} tokens of {info.num_documents:,} documents in "
        f"{progress.elapsed_s:.1f} s"
    )
    return info


def _read_all(
    files: Sequence[SourceFile], text_field: str, progress: "_Progress"
) -> Iterator[Piece]:
    for file in files:
        yield from read_pieces(file, text_field)
        progress.num_files_read += 1


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Group pieces so that small documents are not encoded and written one by one."""
    batch: list[Piece] = []
    num_bytes = 0
    for piece in pieces:
        batch.append(piece)
        num_bytes += len(piece.text)
        if num_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _encode(batch: Sequence[Piece], tokenizer: Tokenizer) -> np.ndarray[Any, Any]:
    end = np.array([tokenizer.eos_id], dtype=np.uint32)
    parts = []
    encoded = tokenizer.encode_pieces([piece.text for piece in batch])
    for piece, ids in zip(batch, encoded, strict=True):
        parts += [ids, end] if piece.ends_document else [ids]
    return np.concatenate(parts)


class _TextDigest:
    """Hash documents so that no two lists of documents look the same."""

    def __init__(self, tokenizer_digest: str) -> None:
        self.num_documents = 0
        self.num_bytes = 0
        self._all = hashlib.sha256(f"gangline tokens {FORMAT_VERSION} {tokenizer_digest} ".encode())
        self._document = hashlib.sha256()
        self._document_bytes = 0

    def update(self, piece: Piece) -> None:
        self._document.update(piece.text)
        self._document_bytes += len(piece.text)
        if piece.ends_document:
            self._all.update(self._document_bytes.to_bytes(8, "little") + self._document.digest())
            self.num_documents += 1
            self.num_bytes += self._document_bytes
            self._document, self._document_bytes = hashlib.sha256(), 0

    def hexdigest(self) -> str:
        return self._all.hexdigest()


class _Progress:
    """Say every few seconds how far the reading is."""

    def __init__(self, num_files: int, report: Report) -> None:
        self.num_files_read = 0
        self._num_files = num_files
        self._report = report
        self._started_s = self._reported_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def update(self, num_bytes: int) -> None:
        now_s = time.monotonic()
        if now_s - self._reported_s >= _REPORT_EVERY_S:
            self._reported_s = now_s
            self._report(
                f"tokenised {num_bytes / 1e6:,.1f} MB of text, {self.num_files_read} of "
                f"{self._num_files} files, {num_bytes / 1e6 / self.elapsed_s:,.1f} MB/s"
            )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
