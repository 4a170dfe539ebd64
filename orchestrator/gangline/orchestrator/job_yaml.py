"""Read the YAML of job files: bounded, without surprises, with the place of every value.

The parser is libyaml's (PyYAML), of which only the event stream is used; values are built here,
with an explicit stack, so that no input can recurse. What a job file cannot hold: aliases and
anchors, tags, duplicate or non-text keys, a second document, control characters, infinities.
Scalars are read by `job_scalars`.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from gangline.orchestrator.job_errors import Keys, Problem, join_path, quote, shorten
from gangline.orchestrator.job_scalars import (
    FORBIDDEN,
    UnreadableScalarError,
    json_as_yaml,
    read_scalar,
)

NUM_MAX_BYTES = 256 * 1024
NUM_MAX_DEPTH = 20
NUM_MAX_NODES = 4_000
NUM_MAX_YAML_PROBLEMS = 50

# libyaml is an optional part of PyYAML; both parsers give the same events.
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Mark(NamedTuple):
    """Where a key and its value stand, counted from 1; `override` if a `--set` put it there."""

    key: tuple[int, int]
    value: tuple[int, int]
    override: str | None = None


@dataclass
class Document:
    """Hold what a text says and where it says it.

    `raw` holds what was written for each plain scalar that is not text: for a field that takes
    text, `1e-3` is the text 1e-3. `unread` are paths whose value could not be read; their problem
    is already in `problems`, so nothing else should be said of them. `broken` tells that reading
    stopped before the end.
    """

    value: Any = None
    marks: dict[Keys, Mark] = field(default_factory=dict)
    raw: dict[Keys, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unread: set[Keys] = field(default_factory=set)
    broken: bool = False


def parse_yaml(source: bytes | str) -> Document:
    """Read one YAML document.

    Returns: the value (dict, list, str, int, float, bool, None) and every fault of the YAML itself.
    Guarantees: raises nothing, whatever the bytes; time and memory grow with `NUM_MAX_BYTES` and
    `NUM_MAX_NODES` at most.
    """
    document = Document()
    text = _decode(source, document)
    if text is None:
        document.broken = True
        return document
    builder = _Builder(document)
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            builder.take(event)
    except _StopReadingError:
        document.broken = True
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error))
        document.broken = True
    except (ValueError, OverflowError, RecursionError):
        # The pure-Python parser lets these through, for instance for "\UFFFFFFFF".
        document.problems.append(_whole("text that the YAML parser cannot read", "YAML 1.2"))
        document.broken = True
    return document


class _StopReadingError(Exception):
    """End the reading; the reason is already among the problems."""


def _whole(found: str, allowed: str, mend: str = "save the file as YAML text") -> Problem:
    return Problem(path="", found=found, allowed=allowed, mend=mend)


def _decode(source: bytes | str, document: Document) -> str | None:
    """Check size, encoding and characters before the parser sees any of it."""
    if isinstance(source, str):
        source = source.encode("utf-8", "surrogatepass")
    if len(source) > NUM_MAX_BYTES:
        document.problems.append(
            _whole(
                f"more than {NUM_MAX_BYTES} bytes",
                f"a job file of at most {NUM_MAX_BYTES} bytes",
                "keep data out of the job file and name its path",
            )
        )
        return None
    try:
        text = json_as_yaml(source.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        line, column = _line_and_column(source[: error.start].decode("utf-8"), error.start)
        bad = _whole(f"the byte 0x{source[error.start]:02x}", "UTF-8", "save the file as UTF-8")
        document.problems.append(bad.at(line=line, column=column))
        return None
    forbidden = FORBIDDEN.search(text)
    if forbidden:
        line, column = _line_and_column(text, forbidden.start())
        bad = _whole(
            f"the control character U+{ord(forbidden.group()):04X}",
            "printable text, line breaks and tabs",
            "remove it, or write it as an escape in a double-quoted text",
        )
        document.problems.append(bad.at(line=line, column=column))
        return None
    return text


def _line_and_column(text: str, index: int) -> tuple[int, int]:
    before = text[:index]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    what = str(getattr(error, "problem", None) or "text that is not YAML")
    context = getattr(error, "context", None)
    mend = "look there for wrong indentation, a missing colon, quote or bracket"
    if "\\t" in what or "cannot start any token" in what:
        mend = "indent with spaces, not tabs, and quote text that starts with @, ` or %"
    elif "mapping values are not allowed" in what:
        mend = "indent it as its neighbours are, or quote the text that holds a colon"
    elif "escape" in what:
        mend = "write the character itself; one above U+FFFF escapes as \\U and 8 digits"
    said = f"{what} {context}" if context else what
    problem = _whole(f"broken YAML ({said})", "YAML 1.2", mend)
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return problem
    return problem.at(line=mark.line + 1, column=mark.column + 1)


class _Discard:
    """Stand for a key whose value is read but not kept."""


_DISCARD = _Discard()


@dataclass
class _Frame:
    container: dict[str, Any] | list[Any]
    path: Keys
    kept: bool
    key: str | _Discard | None = None
    key_mark: tuple[int, int] = (1, 1)


class _Builder:
    """Turn parser events into values, and remember where each stands."""

    def __init__(self, document: Document):
        self.document = document
        self.stack: list[_Frame] = []
        self.num_nodes = 0
        self.num_documents = 0

    def take(self, event: yaml.Event) -> None:
        """Handle one event of the parser."""
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self._open(event, {} if isinstance(event, yaml.MappingStartEvent) else [])
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            self._close()
        elif isinstance(event, yaml.AliasEvent):
            self._count(event)
            self._refuse(
                event,
                Problem(
                    "", f"the alias *{shorten(str(event.anchor))}", "no aliases", "write it out"
                ),
            )
            self._place(None, _place_of(event), readable=False)
        elif isinstance(event, yaml.DocumentStartEvent):
            self._document(event)

    def _document(self, event: yaml.DocumentStartEvent) -> None:
        self.num_documents += 1
        if self.num_documents > 1:
            self._refuse(
                event,
                Problem("", "a second document (---)", "one document", "keep one job per file"),
            )
            raise _StopReadingError
        version: tuple[int, int] | None = event.version
        tags = event.tags
        if tags or version not in (None, (1, 2)):
            self._refuse(
                event, Problem("", "a % directive", "no directive but %YAML 1.2", "remove the line")
            )

    def _open(self, event: yaml.CollectionStartEvent, container: Any) -> None:
        self._count(event)
        self._check_properties(event)
        mark = _place_of(event)
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.container, dict) and top.key is None:
            self._refuse(event, Problem("", "a collection as a key", "text as a key", "use text"))
            top.key = _DISCARD
            self.stack.append(_Frame(container, top.path, kept=False, key_mark=mark))
        else:
            path, kept = self._place(container, mark)
            self.stack.append(_Frame(container, path, kept=kept))
        if len(self.stack) > NUM_MAX_DEPTH:
            too_deep = Problem(
                "",
                f"more than {NUM_MAX_DEPTH} levels of nesting",
                f"{NUM_MAX_DEPTH} at most",
                "close brackets that were left open, or flatten the file",
            )
            self._refuse(event, too_deep)
            raise _StopReadingError

    def _close(self) -> None:
        self.stack.pop()

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        self._count(event)
        self._check_properties(event)
        top = self.stack[-1] if self.stack else None
        is_key = top is not None and isinstance(top.container, dict) and top.key is None
        try:
            value = read_scalar(event.value, plain=event.style in (None, ""))
        except UnreadableScalarError as error:
            self._refuse(event, error.problem)
            if top is not None and is_key:
                top.key = _DISCARD
            else:
                self._place(None, _place_of(event), readable=False)
            return
        if top is not None and is_key:
            self._key(top, value, event)
        else:
            path, kept = self._place(value, _place_of(event))
            if kept and value is not None and not isinstance(value, str):
                self.document.raw[path] = event.value

    def _key(self, frame: _Frame, value: object, event: yaml.ScalarEvent) -> None:
        frame.key_mark = _place_of(event)
        if not isinstance(value, str):
            found = f"the key {quote(event.value)}, which YAML reads as another type"
            self._refuse(event, Problem("", found, "text as a key", "quote the key"))
            frame.key = _DISCARD
        elif value in frame.container:
            first = self.document.marks.get((*frame.path, value))
            where = f" (first on line {first.key[0]})" if first and frame.kept else ""
            found = f"the key {quote(value)} a second time{where}"
            self._refuse(event, Problem("", found, "each key once", "remove one of the two"))
            frame.key = _DISCARD
        else:
            frame.key = value

    def _place(
        self, value: Any, mark: tuple[int, int], *, readable: bool = True
    ) -> tuple[Keys, bool]:
        """Put a value where the parser now stands; tell its path and whether it is kept."""
        if not self.stack:
            path: Keys = ()
            self.document.value = value
            self.document.marks[path] = Mark(mark, mark)
        else:
            top = self.stack[-1]
            key_mark = mark
            if isinstance(top.container, list):
                path = (*top.path, len(top.container))
                top.container.append(value)
            else:
                key, top.key = top.key, None
                if isinstance(key, _Discard):
                    return top.path, False
                if key is None:  # an alias as a key: already refused
                    top.key = _DISCARD
                    return top.path, False
                path = (*top.path, key)
                top.container[key] = value
                key_mark = top.key_mark
            if not top.kept:
                return path, False
            self.document.marks[path] = Mark(key_mark, mark)
        if not readable:
            self.document.unread.add(path)
        return path, True

    def _check_properties(self, event: yaml.NodeEvent) -> None:
        if event.anchor is not None:
            found = f"the anchor &{shorten(str(event.anchor))}"
            self._refuse(event, Problem("", found, "no anchors", "remove it"))
        tag = getattr(event, "tag", None)
        if tag is not None:
            found = f"the tag {quote(str(tag).replace('tag:yaml.org,2002:', '!!'))}"
            self._refuse(
                event, Problem("", found, "no tags", "remove it, and quote the value if it is text")
            )

    def _count(self, event: yaml.Event) -> None:
        self.num_nodes += 1
        if self.num_nodes > NUM_MAX_NODES:
            too_many = Problem(
                "",
                f"more than {NUM_MAX_NODES} values",
                f"{NUM_MAX_NODES} at most",
                "keep data out of the job file and name its path",
            )
            self._refuse(event, too_many)
            raise _StopReadingError

    def _refuse(self, event: yaml.Event, problem: Problem) -> None:
        """Record a problem at an event; give up on a file that is wrong everywhere."""
        line, column = _place_of(event)
        keys: Keys = ()
        if self.stack:
            top = self.stack[-1]
            keys = top.path
            if isinstance(top.key, str):
                keys = (*keys, top.key)
            elif isinstance(top.container, list):
                keys = (*keys, len(top.container))
        located = Problem(join_path(keys), problem.found, problem.allowed, problem.mend)
        self.document.problems.append(located.at(line=line, column=column))
        if len(self.document.problems) >= NUM_MAX_YAML_PROBLEMS:
            raise _StopReadingError


def _place_of(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    assert mark is not None, "both parsers mark every event"
    return mark.line + 1, mark.column + 1
