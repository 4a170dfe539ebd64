"""Which files `data.source` means: names, folders and globs made into one ordered list.

Formats by suffix, in any case: .txt .md .rst (a file is a document), .jsonl (a line is a document)
and .parquet (a row is a document); all but Parquet also as .zst or .gz. Program text (.py and the
like) is left out on purpose: a folder of documentation often holds some. Give code as JSONL.

A folder is read with everything below it. A glob knows `*`, `?`, `[...]` and `**` (any number of
folders, also none); a folder that it matches is read whole. In folders and globs hidden names are
passed over, and so are other suffixes. Links are followed, each folder once, so a loop of links
ends. Order: entries as listed, within an entry by name. A file that comes twice is read once.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

from gangline.trainers.data_errors import DataError
from gangline.trainers.python_docs import PYTHON_DOCS


class Format(Enum):
    """Tell how documents lie in a file."""

    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    PYTHON_DOCS = PYTHON_DOCS


_FORMATS = {
    ".txt": Format.TEXT,
    ".md": Format.TEXT,
    ".rst": Format.TEXT,
    ".jsonl": Format.JSONL,
    ".parquet": Format.PARQUET,
}
_COMPRESSIONS = (".zst", ".gz")
_WANTED = (
    "wanted .txt, .md, .rst or .jsonl (also with .zst or .gz behind it), or .parquet; convert the "
    "text or name other files in data.source"
)
_EVERYTHING_BELOW = ("**", "*")


@dataclass(frozen=True)
class SourceFile:
    """Name one file to read, or, with Format.PYTHON_DOCS, the text that Python brings along."""

    path: str
    format: Format
    compression: str = ""  # "", ".zst" or ".gz"


def find_files(source: str | Sequence[str]) -> list[SourceFile]:
    """List the files of `data.source` in the order in which they are read.

    Raises: DataError if an entry names nothing readable.
    """
    found: dict[str, SourceFile] = {}
    for entry in [source] if isinstance(source, str) else source:
        if entry == PYTHON_DOCS:
            found.setdefault(PYTHON_DOCS, SourceFile(PYTHON_DOCS, Format.PYTHON_DOCS))
            continue
        for file in _find_entry(entry):
            found.setdefault(os.path.realpath(file.path), file)
    return list(found.values())


def _find_entry(entry: str) -> list[SourceFile]:
    name = os.path.expanduser(entry)
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not _is_pattern(name):
            raise DataError(
                f"data.source {entry!r} does not exist (looked in {os.getcwd()!r}); wanted "
                f"{PYTHON_DOCS!r}, a file, a folder or a glob; correct the path in data.source"
            ) from None
        return _find_matches(entry, *_split_pattern(name))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(entry, name, error) from error
    if stat.S_ISDIR(mode):
        return _find_matches(entry, name, _EVERYTHING_BELOW)
    file = _classify(name)
    if not stat.S_ISREG(mode):
        raise DataError(
            f"data.source {entry!r} is neither a regular file nor a folder; wanted a file that "
            "can be read twice; write the text to a file first"
        )
    if file is None:
        raise DataError(f"data.source {entry!r} has the suffix {Path(name).suffix!r}; {_WANTED}")
    return [file]


def _find_matches(entry: str, base: str, pattern: tuple[str, ...]) -> list[SourceFile]:
    paths = sorted(_expand(entry, base, pattern), key=lambda path: path.split(os.sep))
    files = [file for path in paths if (file := _classify(path))]
    if not files:
        seen = f"{len(paths)} files, none of a known format" if paths else "no file at all"
        raise DataError(f"data.source {entry!r} gives {seen}; {_WANTED}")
    for file in files:
        if not os.path.exists(file.path):
            raise DataError(
                f"data.source {entry!r}: {file.path!r} is a link that leads nowhere; wanted a "
                "file; mend or remove the link"
            )
    return files


def _expand(entry: str, base: str, pattern: tuple[str, ...]) -> Iterator[str]:
    """Give every path below `base` that matches and is not a folder, fifo, socket or device."""
    visited: set[tuple[int, int, tuple[str, ...]]] = set()
    pending = [(base, pattern)]
    while pending:
        folder, segments = pending.pop()
        children: list[tuple[str, tuple[str, ...]]] = []
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino, segments)
            if identity in visited:
                continue
            visited.add(identity)
            listing = sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            continue  # the part of a glob before its first wildcard may be missing
        except OSError as error:
            raise _unreadable(entry, folder, error) from error
        if segments[0] == "**":
            # `**` matches no folder at all, or one more.
            segments = segments[1:] or ("*",)
            children.append((folder, segments))
            wanted = [(name, ("**", *segments)) for name in listing if not name.startswith(".")]
            children += [
                (path, rest)
                for name, rest in wanted
                if os.path.isdir(path := os.path.join(folder, name))
            ]
        else:
            for name in listing:
                if not _matches(name, segments[0]):
                    continue
                path = os.path.join(folder, name)
                if os.path.isdir(path):
                    children.append((path, segments[1:] or _EVERYTHING_BELOW))
                elif len(segments) == 1 and _is_file_or_broken_link(path):
                    yield path
        pending.extend(reversed(children))


def _matches(name: str, segment: str) -> bool:
    return fnmatchcase(name, segment) and (segment.startswith(".") or not name.startswith("."))


def _is_file_or_broken_link(path: str) -> bool:
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _split_pattern(name: str) -> tuple[str, tuple[str, ...]]:
    """Split "a/b/*/c.txt" into "a/b" and ("*", "c.txt")."""
    parts = Path(name).parts
    first = next(number for number, part in enumerate(parts) if _is_pattern(part))
    return str(Path(*parts[:first])), parts[first:]


def _classify(path: str) -> SourceFile | None:
    stem, suffix = os.path.splitext(path.lower())
    compression = suffix if suffix in _COMPRESSIONS else ""
    if compression:
        suffix = os.path.splitext(stem)[1]
    known = _FORMATS.get(suffix)
    if known is None or (known is Format.PARQUET and compression):
        return None
    return SourceFile(path, known, compression)


def _unreadable(entry: str, path: str, error: Exception) -> DataError:
    return DataError(
        f"data.source {entry!r}: {path!r} cannot be read: {error}; wanted files and folders that "
        "this user may read; correct data.source or the permissions"
    )
