"""Overrides from the command line: `--set a.b=c`.

The path is written as problems write it (`model.moe.top_k`, `data.source[0]`), the value as in the
job file (`[a, b]`, `null`, `"012"`). An override stands for the line it replaces: it is checked
with the rest of the file, and of two for the same path the later one wins.
"""

import re
from collections.abc import Sequence
from typing import Any

from gangline.orchestrator.job_errors import (
    Keys,
    Problem,
    describe_value,
    join_path,
    quote,
)
from gangline.orchestrator.job_yaml import NUM_MAX_DEPTH, Document, Mark, parse_yaml

_PATH = re.compile(r"[^.\[\]=\s]+(?:\[[0-9]{1,4}\]|\.[^.\[\]=\s]+)*\Z")
_STEP = re.compile(r"\[([0-9]+)\]|([^.\[\]]+)")
_ALLOWED = "PATH=VALUE, such as training.steps=100 or data.source[0]=notes.md"


class _CannotSetError(ValueError):
    """Say why there is no such place to set; the message is what was found."""


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Set each override in a document, in order; what cannot be set becomes a problem."""
    for text in overrides:
        path, equals, value_text = text.partition("=")
        path = path.strip()
        if not equals or len(path) > 1000 or not _PATH.match(path):
            found = f"the override {quote(text.partition('=')[0])}"
            mend = "write the path of a field, an equals sign and a value"
            document.problems.append(Problem("", found, _ALLOWED, mend, override=_label(path)))
            continue
        keys: Keys = tuple(
            int(step[1]) if step[1] is not None else step[2] for step in _STEP.finditer(path)
        )
        value = parse_yaml(value_text)
        if value.problems:
            # The line and column would be those of the argument, so they are left out.
            document.problems += [
                Problem(join_path(keys), p.found, p.allowed, p.mend, override=_label(path))
                for p in value.problems
            ]
            document.unread.add(keys)
            continue
        try:
            created = _set(document, keys, value.value)
        except _CannotSetError as error:
            document.problems.append(
                Problem(
                    join_path(keys),
                    str(error),
                    _ALLOWED,
                    "set a path that exists or that can be added",
                    override=_label(path),
                )
            )
        else:
            _mark(document, keys, created, value, _label(path))


def _label(path: str) -> str:
    # Never the value: it may be a secret.
    return path if path.isprintable() and len(path) <= 200 else quote(path)


def _set(document: Document, keys: Keys, value: Any) -> Keys:
    """Put the value at its place; return the path of the topmost container made for it."""
    if len(keys) > NUM_MAX_DEPTH:
        raise _CannotSetError(f"a path of {len(keys)} steps")
    if document.value is None:
        document.value = {}
    node: Any = document.value
    for position, key in enumerate(keys):
        _check_step(node, key, keys[:position])
        child = _get(node, key)
        if child is None or position == len(keys) - 1:
            new = _wrap(keys[position + 1 :], value)
            if isinstance(key, int) and key == len(node):
                node.append(new)
            else:
                node[key] = new
            return keys[: position + 1]
        node = child
    raise AssertionError("a path has at least one step")


def _get(node: Any, key: str | int) -> Any:
    if isinstance(key, int):
        return node[key] if key < len(node) else None
    return node.get(key)


def _wrap(keys: Keys, value: Any) -> Any:
    """Put a value into containers that do not exist yet."""
    for key in reversed(keys):
        if isinstance(key, int) and key != 0:
            raise _CannotSetError(f"item {key} of a list that has none")
        value = [value] if isinstance(key, int) else {key: value}
    return value


def _check_step(node: Any, key: str | int, here: Keys) -> None:
    place = join_path(here) or "the file"
    if isinstance(key, str) and not isinstance(node, dict):
        raise _CannotSetError(f"{place}, which is {describe_value(node)} and has no keys")
    if isinstance(key, int):
        if not isinstance(node, list):
            raise _CannotSetError(f"{place}, which is {describe_value(node)} and no list")
        if key > len(node):
            raise _CannotSetError(f"item {key} of {place}, which has {len(node)}")


def _mark(document: Document, keys: Keys, created: Keys, value: Document, label: str) -> None:
    """Let what was set be reported as coming from the command line."""
    for table in (document.marks, document.raw):
        for path in [path for path in table if path[: len(keys)] == keys]:
            del table[path]
    document.unread = {path for path in document.unread if path[: len(keys)] != keys}
    mark = Mark((0, 0), (0, 0), label)
    for length in range(len(created), len(keys)):
        document.marks[keys[:length]] = mark
    for below in value.marks:
        document.marks[keys + below] = mark
    for below, text in value.raw.items():
        document.raw[keys + below] = text
