"""The JSON schema of job files, and what it says of a field in words."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from gangline.orchestrator.job_models import KINDS, PATTERN_WORDS, Job
from gangline.orchestrator.job_scalars import write_scalar

Schema = dict[str, Any]

_NUM_MAX_KEYS_SHOWN = 16


@cache
def job_adapter() -> TypeAdapter[Any]:
    """Return the validator of all kinds of job."""
    return TypeAdapter(Job)


def job_schema() -> Schema:
    """Return the JSON schema (draft 2020-12) of a job file, for editors and other checkers.

    Guarantees: a file that Gangline accepts is valid under it. The reverse does not hold: what
    fields must agree on, and which files must exist, a schema cannot say.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Gangline job file",
        "description": "What `gangline run`, `submit` and `plan` take; `kind` says what to run.",
        **_raw_schema(),
    }


@cache
def _raw_schema() -> Schema:
    return job_adapter().json_schema()


def resolve(schema: Schema) -> Schema:
    """Follow a reference into the schema's definitions."""
    while "$ref" in schema:
        schema = _raw_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def kind_schema(kind: str) -> Schema:
    """Return the schema of one kind of job."""
    return _raw_schema()["$defs"][KINDS[kind].__name__]  # type: ignore[no-any-return]


def schema_at(kind: str, keys: Sequence[str | int]) -> Schema | None:
    """Return the schema of the field at a path, or None if there is no such field."""
    schema = kind_schema(kind)
    for key in keys:
        child = _child(schema, key)
        if child is None:
            return None
        schema = child
    return schema


def _child(schema: Schema, key: str | int) -> Schema | None:
    schema = resolve(schema)
    for option in schema.get("anyOf", ()):
        found = _child(option, key)
        if found is not None:
            return found
    if isinstance(key, str):
        child = schema.get("properties", {}).get(key)
        if child is None and isinstance(schema.get("additionalProperties"), dict):
            child = schema["additionalProperties"]
        return child  # type: ignore[no-any-return]
    prefix = schema.get("prefixItems", ())
    if key < len(prefix):
        return prefix[key]  # type: ignore[no-any-return]
    return schema.get("items")


def keys_of(schema: Schema) -> list[str]:
    """Return the keys that a mapping may have here; empty if it is not a section."""
    schema = resolve(schema)
    for option in schema.get("anyOf", ()):
        if keys := keys_of(option):
            return keys
    return list(schema.get("properties", ()))


@cache
def field_names(kind: str) -> frozenset[str]:
    """Return the dotted name of every section and field of a kind."""
    names: set[str] = set()

    def walk(schema: Schema, prefix: str) -> None:
        for key in keys_of(schema):
            names.add(prefix + key)
            child = _child(schema, key)
            assert child is not None, "a key of a section has a schema"
            walk(child, f"{prefix}{key}.")

    walk(kind_schema(kind), "")
    return frozenset(names)


@cache
def sections(kind: str) -> tuple[str, ...]:
    """Return the names of the sections of a kind."""
    schema = kind_schema(kind)
    return tuple(key for key in keys_of(schema) if keys_of(schema["properties"][key]))


def describe(schema: Schema) -> str:
    """Say in words what a field takes."""
    schema = resolve(schema)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(describe(option) for option in schema["anyOf"]))
    if "const" in schema:
        return write_scalar(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(write_scalar(value) for value in schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return "text"
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(schema)
    if kind == "string":
        return _describe_text(schema)
    if kind == "array":
        return _describe_list(schema)
    if kind == "object":
        return _describe_mapping(schema)
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "a value")


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    parts = []
    if low is not None:
        parts.append(f"at least {_number(low)}")
    if above is not None:
        parts.append(f"above {_number(above)}")
    if high is not None:
        parts.append(f"at most {_number(high)}")
    if below is not None:
        parts.append(f"below {_number(below)}")
    return " " + ", ".join(parts) if parts else ""


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else str(value)


def _describe_text(schema: Schema) -> str:
    pattern = schema.get("pattern")
    if pattern in PATTERN_WORDS:
        return PATTERN_WORDS[pattern]
    if pattern is not None:
        return f"text that matches {pattern}"
    return "text" + _lengths(schema, "minLength", "maxLength", "character")


def _describe_list(schema: Schema) -> str:
    if "prefixItems" in schema:
        items = [describe(item) for item in schema["prefixItems"]]
        each = f"each {items[0]}" if len(set(items)) == 1 else ", ".join(items)
        return f"a list of {len(items)} items, {each}"
    size = _lengths(schema, "minItems", "maxItems", "item")
    return f"a list{size}, each {describe(schema.get('items', {}))}"


def _lengths(schema: Schema, low_key: str, high_key: str, unit: str) -> str:
    low, high = schema.get(low_key, 0), schema.get(high_key)
    if low and high is not None:
        return f" of {low} to {high} {unit}s"
    if low:
        return f" of at least {low} {unit}{'s' if low > 1 else ''}"
    return f" of at most {high} {unit}s" if high is not None else ""


def _describe_mapping(schema: Schema) -> str:
    if "properties" in schema:
        return "a mapping with the keys " + list_keys(list(schema["properties"]))
    return f"a mapping from names to {describe(schema.get('additionalProperties', {}))}"


def list_keys(keys: Sequence[str]) -> str:
    """Write keys one after the other, abbreviated."""
    more = f" and {len(keys) - _NUM_MAX_KEYS_SHOWN} more" if len(keys) > _NUM_MAX_KEYS_SHOWN else ""
    return ", ".join(keys[:_NUM_MAX_KEYS_SHOWN]) + more
