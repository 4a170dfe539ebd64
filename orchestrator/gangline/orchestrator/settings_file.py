"""Load settings from a YAML file of any kind, with the reader and the errors of job files.

    load_settings(LabFile, "lab.yaml", what="lab file") -> LabFile

For files that are simpler than a job file: one model, no secrets, no paths that must exist.
Importing this file loads neither torch nor ray nor mlflow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gangline.orchestrator.job_errors import (
    JobFileError,
    Keys,
    Problem,
    clip,
    describe_value,
    join_path,
    show_file_name,
)
from gangline.orchestrator.job_explain import Located, value_at
from gangline.orchestrator.job_mend import mend_for
from gangline.orchestrator.job_schema import describe, keys_of, list_keys
from gangline.orchestrator.job_set import apply_overrides
from gangline.orchestrator.job_yaml import NUM_MAX_BYTES, Document, parse_yaml

Model = TypeVar("Model", bound=BaseModel)
Schema = dict[str, Any]

# How a check over several fields says at which of them it looks: "fabric.leaves: ...; mend".
_FIELD_IN_FRONT = re.compile(r"([a-z_]+(?:\.[a-z_]+)*): ")


def load_settings(
    model: type[Model],
    source: Path | str,
    overrides: Sequence[str] = (),
    *,
    what: str,
    defaults: Mapping[str, Any] | None = None,
) -> Model:
    """Load a file as a model.

    `source` is its path, or its text if it is a str with a line break. `overrides` are `--set`
    arguments. `what` is how errors call such a file. `defaults` are values of top-level keys that
    the file leaves out.

    Raises: JobFileError with every fault.
    """
    if isinstance(source, str) and "\n" in source:
        return parse_settings(model, source, overrides, file=what, defaults=defaults)
    file = show_file_name(source)
    try:
        # One byte more than allowed, so that the reader sees that it is too much.
        with Path(source).open("rb") as stream:
            text = stream.read(NUM_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = Problem(
            "", f"no file that can be read ({reason})", f"a {what} in YAML", "check the path"
        )
        raise JobFileError([problem], file=file) from None
    return parse_settings(model, text, overrides, file=file, defaults=defaults)


def parse_settings(
    model: type[Model],
    text: bytes | str,
    overrides: Sequence[str] = (),
    *,
    file: str,
    defaults: Mapping[str, Any] | None = None,
) -> Model:
    """Load the text of a file as a model; `file` is how errors name it. See `load_settings`."""
    document = parse_yaml(text)
    if document.broken:
        raise JobFileError(document.problems, file=file)
    apply_overrides(document, overrides)
    problems = list(document.problems)
    tree = document.value
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else describe_value(tree)
        keys = list_keys(list(model.model_fields))
        raise JobFileError(
            [*problems, Problem("", found, "a mapping", f"write one of the keys {keys}")], file=file
        )
    tree = {**(defaults or {}), **tree}
    settings: Model | None = None
    try:
        settings = model.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems += _problems(error, model, tree, document)
    if problems:
        problems.sort(key=lambda p: (p.line is None, p.line or 0, p.column or 0, p.path))
        raise JobFileError(problems, file=file)
    assert settings is not None, "a file without a problem is settings"
    return settings


def _problems(
    error: ValidationError, model: type[BaseModel], tree: Schema, document: Document
) -> list[Problem]:
    schema = _without_references(model.model_json_schema())
    found: dict[Keys, tuple[dict[str, Any], Schema, Schema]] = {}
    for item in error.errors(include_url=False, include_input=False):
        loc = item["loc"]
        if item["type"] == "value_error":
            field = _FIELD_IN_FRONT.match(str(item["ctx"]["error"]))
            loc = (*loc, *field[1].split(".")) if field else loc
        keys, field_schema, parent = _place(loc, tree, schema, item["type"])
        if any(keys[:length] in document.unread for length in range(len(keys) + 1)):
            continue
        # Of several errors at one path (branches of a union) the first will do.
        found.setdefault(keys, (dict(item), field_schema, parent))
    deeper = {keys[:length] for keys in found for length in range(len(keys))}
    problems = []
    for keys, (details, field_schema, parent) in found.items():
        if keys in deeper and keys and details["type"] != "value_error":
            continue  # a list of sections is no number either; what is wrong inside says more
        problem = _explain(details, keys, field_schema, parent, tree)
        at_key = details["type"] == "extra_forbidden"
        problems.append(Located(keys, problem, at_key).placed_in(document))
    return problems


def _place(
    loc: tuple[int | str, ...], tree: Any, schema: Schema, error_type: str
) -> tuple[Keys, Schema, Schema]:
    """Return the path in the file, the schema of its field, and that of the section around it.

    pydantic's location also names the branches of unions, which are not in the file.
    """
    keys: list[int | str] = []
    parent = schema
    node = tree
    for position, step in enumerate(loc):
        options: list[Schema] = schema.get("oneOf", []) + schema.get("anyOf", [])
        is_there = (isinstance(node, dict) and step in node) or (
            isinstance(node, list) and isinstance(step, int) and 0 <= step < len(node)
        )
        is_missing = position == len(loc) - 1 and (
            error_type == "missing" or (error_type == "value_error" and bool(_child(schema, step)))
        )
        if not is_there and not is_missing:
            if position < len(loc) - 1:
                schema = next((option for option in options if _is_branch(option, step)), schema)
            continue
        keys.append(step)
        parent, schema = schema, _child(schema, step)
        node = node[step] if is_there else None
    return tuple(keys), schema, parent


def _is_branch(option: Schema, step: int | str) -> bool:
    """Tell whether a step of pydantic's location means this option of a union."""
    tags = [field.get("const") for field in option.get("properties", {}).values()]
    return step in (*tags, option.get("title"), option.get("type"))


def _child(schema: Schema, step: int | str) -> Schema:
    for option in (schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())):
        if isinstance(step, int) and "items" in option:
            return dict(option["items"])
        if step in option.get("properties", {}):
            return dict(option["properties"][step])
    return {}


def _explain(
    item: dict[str, Any], keys: Keys, schema: Schema, parent: Schema, tree: Schema
) -> Problem:
    path = join_path(keys)
    if item["type"] == "missing":
        return Problem(path, "nothing", describe(schema), f"add `{keys[-1]}: ...`")
    if item["type"] == "extra_forbidden":
        names = keys_of(parent)
        close = get_close_matches(str(keys[-1])[:64], names, n=1)
        mend = f"did you mean {close[0]}?" if close else "remove it"
        return Problem(path, "a key that is not known here", f"the keys {list_keys(names)}", mend)
    value = value_at(tree, keys)
    found = describe_value(value)
    if item["type"] in ("value_error", "assertion_error"):
        text = _FIELD_IN_FRONT.sub("", clip(str(item["ctx"]["error"])), count=1)
        said, _, mend = text.rpartition("; ")
        if value is None and keys and value_at(tree, keys[:-1]) is not None:
            found = "nothing"
        return Problem(path, found, f"values that pass its check ({said or mend})", mend)
    if item["type"].startswith("union_tag"):
        allowed = str(item.get("ctx", {}).get("expected_tags") or "a mapping with its kind")
        close = get_close_matches(
            str(item.get("ctx", {}).get("tag", ""))[:64], allowed.replace("'", "").split(", "), n=1
        )
        mend = f"did you mean {close[0]}?" if close else "choose one of them"
        return Problem(path, found, f"kind: one of {allowed}", mend)
    if not schema:
        return Problem(path, found, clip(item["msg"]), "change it to what is allowed")
    return Problem(path, found, describe(schema), mend_for(value, schema, keys))


def _without_references(schema: Schema) -> Schema:
    """Write every `$ref` of a schema out; models that hold themselves are not for files."""
    definitions = schema.pop("$defs", {})

    def expand(node: Any) -> Any:
        if isinstance(node, list):
            return [expand(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            rest = {key: value for key, value in node.items() if key != "$ref"}
            return expand({**definitions[node["$ref"].rpartition("/")[2]], **rest})
        return {key: expand(value) for key, value in node.items()}

    expanded: Schema = expand(schema)
    return expanded
