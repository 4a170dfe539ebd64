"""What is wrong with a job file, and how it is said.

    UsageError, ValueError
    └── JobFileError      everything that one look at a job file found, as a list of `Problem`

Each problem says where it is, what was found, what is allowed, and the mend, on one line. Text that
came out of the file is abbreviated and its control characters are escaped, so that a job file can
neither flood nor steer the terminal that shows its faults.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gangline.orchestrator.errors import UsageError

NUM_MAX_PROBLEMS = 100
NUM_MAX_SHOWN_CHARACTERS = 60
NUM_MAX_SENTENCE_CHARACTERS = 400

Keys = tuple[str | int, ...]
"""A path into a job file: keys of mappings and indexes of lists."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Say what is wrong at one place of a job file.

    `path` is the field (`model.moe.top_k`), or empty for the file as a whole. `line` and `column`
    count from 1 and are None where the file does not hold the place. `override` is the `--set`
    argument that put the value there, if one did.
    """

    path: str
    found: str
    allowed: str
    mend: str
    line: int | None = None
    column: int | None = None
    override: str | None = None

    def render(self, file: str = "") -> str:
        """Write the problem on one line, with the place in front as compilers do."""
        place = file or "job file"
        if self.override is not None:
            place = f"--set {self.override}"
        elif self.line is not None:
            place = f"{place}:{self.line}:{self.column}"
        field = f"{self.path}: " if self.path and self.path != self.override else ""
        return f"{place}: {field}found {self.found}; allowed: {self.allowed}; {self.mend}"

    def at(self, *, line: int | None, column: int | None, override: str | None = None) -> "Problem":
        """Return the same problem with its place filled in."""
        return replace(self, line=line, column=column, override=override)


class JobFileError(UsageError, ValueError):
    """Carry every fault that one look at a job file found.

    At most `NUM_MAX_PROBLEMS` problems are carried; `num_left_out` counts the rest.
    """

    def __init__(self, problems: Sequence[Problem], *, file: str = "", num_left_out: int = 0):
        assert problems, "a JobFileError without a problem cannot be mended by anybody"
        self.problems = list(problems[:NUM_MAX_PROBLEMS])
        self.num_left_out = num_left_out + len(problems) - len(self.problems)
        self.file = file
        super().__init__(self.render())

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by calling the class with `args`, which here is the rendered text.
        return _rebuild, (self.problems, self.file, self.num_left_out)

    def render(self) -> str:
        """Write one line per problem."""
        lines = [problem.render(self.file) for problem in self.problems]
        if self.num_left_out:
            lines.append(f"{self.file or 'job file'}: and {self.num_left_out} more problems")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the same as data, for `--json`."""
        return {
            "error": "job_file",
            "file": self.file,
            "problems": [asdict(problem) for problem in self.problems],
            "num_left_out": self.num_left_out,
        }


def _rebuild(problems: list[Problem], file: str, num_left_out: int) -> JobFileError:
    return JobFileError(problems, file=file, num_left_out=num_left_out)


def join_path(keys: Iterable[str | int]) -> str:
    """Write a path as people do: `data.source[0]`."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            shown = key if _is_plain_key(key) else quote(key)
            text += f".{shown}" if text else shown
    return text


def shorten(text: str) -> str:
    """Abbreviate text from a job file and escape what is unprintable, without quotes."""
    return quote(text[: NUM_MAX_SHOWN_CHARACTERS - 3])[1:-1] + (
        "..." if len(text) > NUM_MAX_SHOWN_CHARACTERS - 3 else ""
    )


def quote(text: str) -> str:
    """Quote text from a job file: abbreviated, on one line, nothing unprintable in it."""
    if len(text) > NUM_MAX_SHOWN_CHARACTERS:
        return f"{text[: NUM_MAX_SHOWN_CHARACTERS - 3]!r}..."
    return repr(text)


def clip(sentence: str) -> str:
    """Fit the message of a check, which may repeat what the file holds, into a problem's line."""
    if len(sentence) > NUM_MAX_SENTENCE_CHARACTERS:
        half = NUM_MAX_SENTENCE_CHARACTERS // 2
        sentence = f"{sentence[:half]}...{sentence[-half:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence)


def show_file_name(path: Path | str) -> str:
    """Write a file name so that it cannot steer a terminal."""
    name = str(path)
    return name if name.isprintable() else repr(name)


def describe_value(value: object, *, secret: bool = False) -> str:
    """Say what a value of a job file is: its type, and the value, abbreviated.

    With `secret` the value itself is not shown.
    """
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"a mapping with {_some_keys(value)}" if value else "an empty mapping"
    if isinstance(value, (list, tuple)):
        if not value:
            return "an empty list"
        return f"a list of {len(value)} item{'s' if len(value) > 1 else ''}"
    kind = _word_for(value)
    if secret:
        return f"{kind} (not shown)"
    return f"{kind} {quote(value) if isinstance(value, str) else _scalar(value)}"


def _word_for(value: object) -> str:
    if isinstance(value, bool):
        return "the truth value"
    if isinstance(value, int):
        return "the whole number"
    if isinstance(value, float):
        return "the number"
    return "the text"


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)[:NUM_MAX_SHOWN_CHARACTERS]


def _some_keys(value: Mapping[Any, object]) -> str:
    keys = [str(key) for key in list(value)[:3]]
    shown = ", ".join(key if _is_plain_key(key) else quote(key) for key in keys)
    more = f" and {len(value) - 3} more" if len(value) > 3 else ""
    return f"the key{'s' if len(value) > 1 else ''} {shown}{more}"


def _is_plain_key(key: str) -> bool:
    return (
        0 < len(key) <= NUM_MAX_SHOWN_CHARACTERS
        and key.isascii()
        and key.replace("_", "").replace("-", "").isalnum()
    )
