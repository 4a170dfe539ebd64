"""Read and write the scalars of job files, by the core schema of YAML 1.2.

`no`, `1:30`, `1_000` and `2026-01-01` are text, `1e-4` is a number, `0o14` is 12. One exception:
a decimal number with leading zeros (`012`) is refused, for YAML 1.1 reads it as 10 and YAML 1.2
as 12.
What `dump_yaml` writes is read back as the same value, by YAML 1.1 readers, too.

Source: YAML 1.2.2, section 10.3.2 (core schema).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from gangline.orchestrator.job_errors import Problem, shorten

Scalar = str | int | float | bool | None

_NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")
_LEADING_ZERO = re.compile(r"[-+]?0+[0-9]+\Z")

# All but YAML's printable characters, and the three that YAML 1.1 takes as line breaks.
FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
# An escape in a quoted text may make any character but these: no argument, path or environment
# variable can hold the first, and the others are not characters.
_NEVER = re.compile("[\x00\ud800-\udfff]")

# After an even number of backslashes, which are themselves escaped.
_SURROGATE_PAIR = re.compile(
    r"(?<!\\)((?:\\\\)*)\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})"
)

_PLAIN_TEXT = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*\Z")
_WORDS_OF_YAML_1_1 = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null"])
_NUM_MAX_FLOW_CHARACTERS = 88


class UnreadableScalarError(ValueError):
    """Say that a scalar has no value in a job file; `problem` has no place yet."""

    def __init__(self, found: str, allowed: str, mend: str):
        super().__init__(found)
        self.problem = Problem(path="", found=found, allowed=allowed, mend=mend)


def read_scalar(text: str, *, plain: bool) -> Scalar:
    """Read a scalar; a quoted one is text, a plain one may be a number, a truth value or null.

    Raises: UnreadableScalarError.
    """
    if plain:
        return _read_plain(text)
    bad = _NEVER.search(text)
    if bad:
        raise UnreadableScalarError(
            f"text with the character U+{ord(bad.group()):04X}",
            "text without that character",
            "remove the escape",
        )
    return text


def _read_plain(text: str) -> Scalar:
    if _NULL.match(text):
        return None
    first = text[0]
    if first in "tTfF" and _BOOL.match(text):
        return first in "tT"
    if first not in "0123456789+-.":
        return text
    if _LEADING_ZERO.match(text):
        digits = text.lstrip("+-").lstrip("0") or "0"
        raise UnreadableScalarError(
            f"the number {shorten(text)} with leading zeros",
            "numbers that every YAML reads alike",
            f"write {digits[:20]}, or 0o... if it is octal, or quote it if it is text",
        )
    if _INT.match(text):
        return _integer(text, 10)
    if _OCTAL.match(text):
        return _integer(text[2:], 8)
    if _HEX.match(text):
        return _integer(text[2:], 16)
    if _FLOAT.match(text):
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise _not_finite(text)
        return value
    if _NOT_FINITE.match(text):
        raise _not_finite(text)
    return text


def _not_finite(text: str) -> UnreadableScalarError:
    return UnreadableScalarError(shorten(text), "finite numbers", "write a finite number")


def _integer(digits: str, base: int) -> int:
    # The length first: Python refuses thousands of digits with a ValueError of its own.
    if len(digits) > 64 or not -(2**63) <= (value := int(digits, base)) < 2**63:
        raise UnreadableScalarError(
            f"the number {shorten(digits)}", "whole numbers of 64 bits", "write a smaller one"
        )
    return value


def json_as_yaml(text: str) -> str:
    """Rewrite what JSON may hold and YAML may not, if the text is JSON; else return it as it is.

    JSON writes a character above U+FFFF as two escapes, and takes some control characters raw.
    """
    if not text.lstrip().startswith("{"):
        return text
    if not (_SURROGATE_PAIR.search(text) or FORBIDDEN.search(text)):
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    # In JSON all of these stand inside double quotes, where YAML knows the escapes written here.
    return FORBIDDEN.sub(_escape, _SURROGATE_PAIR.sub(_join_pair, text))


def _join_pair(match: re.Match[str]) -> str:
    high, low = int(match[2], 16), int(match[3], 16)
    return f"{match[1]}\\U{0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00):08x}"


def dump_yaml(value: Mapping[str, object]) -> str:
    """Write a mapping as a YAML document that `parse_yaml` reads back as an equal value."""
    lines: list[str] = []
    _write_mapping(value, 0, lines)
    return "\n".join(lines) + "\n"


def _write_mapping(mapping: Mapping[str, object], indent: int, lines: list[str]) -> None:
    for key, value in mapping.items():
        start = " " * indent + f"{write_scalar(key)}:"
        if isinstance(value, Mapping) and value:
            lines.append(start)
            _write_mapping(value, indent + 2, lines)
        elif _is_list(value) and len(start) + len(_flow(value)) > _NUM_MAX_FLOW_CHARACTERS:
            lines.append(start)
            lines.extend(" " * (indent + 2) + f"- {_flow(item)}" for item in value)
        else:
            lines.append(f"{start} {_flow(value)}")


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, (list, tuple)) and len(value) > 0


def _flow(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{write_scalar(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return write_scalar(value)


def write_scalar(value: object) -> str:
    """Write a scalar so that YAML 1.1 and YAML 1.2 read it alike, and as this value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _write_float(value)
    assert isinstance(value, str), f"a job file holds no {type(value).__name__}"
    if _PLAIN_TEXT.match(value) and value.lower() not in _WORDS_OF_YAML_1_1:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return FORBIDDEN.sub(_escape, quoted)


def _write_float(value: float) -> str:
    text = repr(value)
    # YAML 1.1 takes 1e-05 for text: it wants a point and a sign.
    mantissa, e, exponent = text.partition("e")
    if e and "." not in mantissa:
        mantissa += ".0"
    return f"{mantissa}{e}{exponent}"


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
