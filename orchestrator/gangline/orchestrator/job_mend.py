"""How to mend a wrong field: the advice at the end of a problem's line."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from gangline.orchestrator.job_errors import Keys, join_path, quote
from gangline.orchestrator.job_models import KINDS, NAME_PATTERN
from gangline.orchestrator.job_scalars import UnreadableScalarError, read_scalar, write_scalar
from gangline.orchestrator.job_schema import field_names, keys_of, resolve

# What other launchers call it.
_OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "num_workers": "workers.count",
    "world_size": "workers.count",
    "replicas": "workers.count",
    "nodes": "workers.count",
    "max_steps": "training.steps",
    "num_steps": "training.steps",
    "epochs": "training.steps",
    "num_epochs": "training.steps",
    "max_restarts": "faults.max_failures",
    "retries": "faults.max_failures",
    "hidden_size": "model.dim",
    "d_model": "model.dim",
    "n_layers": "model.num_layers",
    "n_heads": "model.num_heads",
    "dtype": "training.precision",
    "dataset": "data.source",
    "entrypoint": "script",
    "command": "script",
    "environment": "env",
    "secrets": "env_from",
    "ep": "mesh.expert_parallel",
}
_BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_TIME_UNITS = {"ms": 0.001, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s?([A-Za-z]{1,3}?)(?:b|B)?\Z")


def mend_for_unknown_key(kind: str, keys: Keys, names: Sequence[str]) -> str:
    """Advise what to do with a key that the model does not have."""
    key = str(keys[-1])
    if len(key) > 64:
        return "remove it"
    close = get_close_matches(key, names, n=1, cutoff=0.7)
    if close:
        return f"did you mean {close[0]}?"
    known = field_names(kind)
    elsewhere = sorted(name for name in known if name.rpartition(".")[2] == key)
    other = _OTHER_NAMES.get(key.lower())
    if other in known:
        elsewhere.append(str(other))
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    other_kinds = [name for name in KINDS if name != kind and join_path(keys) in field_names(name)]
    if other_kinds:
        return f"remove it; it belongs to kind {' and '.join(other_kinds)}"
    close = get_close_matches(key, sorted(known), n=1, cutoff=0.8)
    return f"did you mean {close[0]}?" if close else "remove it"


def mend_for(value: object, schema: dict[str, Any], keys: Keys) -> str:
    """Advise how to make a value right that its field does not take.

    `schema` is the field's JSON schema; a mend that it would refuse again is not offered.
    """
    types = _types(schema)
    if value is None:
        default = _default(schema)
        return f"remove the line for the default, {default}" if default else "give it a value"
    if isinstance(value, str):
        mend = _mend_text(value, schema, types, keys)
    else:
        mend = _mend_other(value, schema, types)
    return mend or _mend_bound(value, schema) or _example(schema)


def _mend_text(value: str, schema: dict[str, Any], types: set[str], keys: Keys) -> str | None:
    options = _options(schema)
    if options:
        close = get_close_matches(value.lower()[:64], options, n=1, cutoff=0.5)
        return f"did you mean {close[0]}?" if close else None
    if "boolean" in types and value.lower() in ("yes", "on", "y", "no", "off", "n"):
        return f"write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
    if types & {"integer", "number"}:
        return _mend_number(value, types, str(keys[-1]) if keys else "")
    if schema.get("pattern") == NAME_PATTERN:
        name = slug(value)
        return f"write for instance {name}" if name else None
    if "array" in types and "string" not in types:
        return f"write a list: [{quote(value)}]"
    if not value:
        return "remove the line, or write what it is"
    lengths = [option.get("maxLength") for option in _flatten(schema)]
    longest = max((length for length in lengths if length is not None), default=len(value))
    return f"shorten it by {len(value) - longest} characters" if len(value) > longest else None


def _mend_number(value: str, types: set[str], key: str) -> str | None:
    plain = value.strip().replace("_", "").replace(",", "")
    if "number" not in types and re.fullmatch(r"[-+]?[0-9]{1,18}(?:\.0+)?", plain):
        return f"write {int(float(plain))}, without quotes" if plain == value else f"write {plain}"
    try:
        number = read_scalar(plain, plain=True) if plain else None
    except UnreadableScalarError:
        number = None
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        return f"write {write_scalar(number)}, without quotes"
    quantity = _QUANTITY.match(value.strip())
    if quantity is None:
        return None
    size, unit = float(quantity[1]), quantity[2].lower()
    if key.endswith("_bytes"):
        factor = _BINARY_UNITS.get(unit) or _BYTE_UNITS.get(unit)
        return f"write {int(size * factor)} (bytes)" if factor else None
    if key.endswith("_s") and unit in _TIME_UNITS:
        return f"write {size * _TIME_UNITS[unit]:g} (seconds)"
    return None


def _mend_other(value: object, schema: dict[str, Any], types: set[str]) -> str | None:
    if isinstance(value, float) and value.is_integer() and "integer" in types and abs(value) < 1e15:
        return f"write {int(value)}"
    if "boolean" in types and value in (0, 1):
        return f"write {'true' if value else 'false'}"
    if "array" in types and isinstance(value, (int, float)) and "integer" not in types:
        return f"write a list: [{write_scalar(value)}]"
    if "string" in types and isinstance(value, (int, float)) and not _options(schema):
        return f'quote it: "{write_scalar(value)}"'
    return None


def _mend_bound(value: object, schema: dict[str, Any]) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    for option in _flatten(schema):
        low, high = option.get("minimum"), option.get("maximum")
        if low is not None and value < low:
            return f"raise it to at least {write_scalar(low)}"
        if high is not None and value > high:
            return f"lower it to at most {write_scalar(high)}"
        above, below = option.get("exclusiveMinimum"), option.get("exclusiveMaximum")
        if above is not None and value <= above:
            return f"raise it above {write_scalar(above)}"
        if below is not None and value >= below:
            return f"lower it below {write_scalar(below)}"
    return None


def _example(schema: dict[str, Any]) -> str:
    default = _default(schema)
    if default:
        return f"write for instance {default}"
    if schema.get("examples"):
        example = schema["examples"][0]
        shown = f"[{', '.join(example)}]" if isinstance(example, list) else write_scalar(example)
        return f"write for instance {shown}"
    if keys := keys_of(schema):
        return f"write keys below it, for instance {keys[0]}: ..."
    return "change it to what is allowed"


def _default(schema: dict[str, Any]) -> str | None:
    """Write a field's default, if it is a value that can be written on one line."""
    default = schema.get("default")
    if isinstance(default, list) and default:
        return "[" + ", ".join(write_scalar(item) for item in default) + "]"
    if default is None or isinstance(default, (dict, list)) or default == "":
        return None
    return write_scalar(default)


def _flatten(schema: dict[str, Any]) -> list[dict[str, Any]]:
    schema = resolve(schema)
    options = schema.get("anyOf")
    return [resolve(option) for option in options] if options else [schema]


def _types(schema: dict[str, Any]) -> set[str]:
    types: set[str] = set()
    for option in _flatten(schema):
        kind = option.get("type", ())
        types.update([kind] if isinstance(kind, str) else kind)
    return types


def _options(schema: dict[str, Any]) -> list[str]:
    values: list[Any] = []
    for option in _flatten(schema):
        values += option.get("enum", [option["const"]] if "const" in option else [])
    return [value for value in values if isinstance(value, str)]


def slug(text: str) -> str:
    """Make a valid job name of any text; empty if nothing of it can be kept."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text[:256].lower()).strip("-._")
    return name[:54].rstrip("-._")
