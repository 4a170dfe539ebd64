"""Write the reference of the job file from its models.

    python -m gangline.orchestrator.job_reference docs

brings `docs/job-file.md` (below its marker line) and `docs/job-file.schema.json` up to date.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gangline.orchestrator.job_models import KINDS, JobBase
from gangline.orchestrator.job_scalars import write_scalar
from gangline.orchestrator.job_schema import (
    Schema,
    describe,
    job_schema,
    keys_of,
    kind_schema,
    resolve,
)

MARKER = "<!-- Below here: written by `python -m gangline.orchestrator.job_reference docs`. -->"


def job_reference() -> str:
    """Return the reference of all fields as Markdown."""
    common = list(JobBase.model_fields)
    any_kind = next(iter(KINDS))
    parts = ["## Fields of every kind", ""]
    parts += _section("", kind_schema(any_kind), [key for key in common if key != "kind"])
    for kind in KINDS:
        schema = kind_schema(kind)
        parts += [f"## kind: {kind}", "", schema["description"], ""]
        parts += _section("", schema, [key for key in keys_of(schema) if key not in common])
    return "\n".join(parts).rstrip() + "\n"


def _section(prefix: str, schema: Schema, keys: list[str]) -> list[str]:
    """Write one table for the fields of a section, and then its inner sections."""
    properties = resolve(schema)["properties"]
    plain = [key for key in keys if not keys_of(properties[key])]
    lines: list[str] = []
    if plain:
        lines += ["| field | takes | default | meaning |", "|---|---|---|---|"]
        required = resolve(schema).get("required", ())
        lines += [_row(prefix + key, properties[key], key in required) for key in plain]
        lines.append("")
    for key in keys:
        if key in plain:
            continue
        inner = _inner_section(properties[key])
        lines += [
            f"### {prefix}{key}",
            "",
            f"{inner['description']} {_or_null(properties[key])}".rstrip(),
            "",
        ]
        lines += _section(f"{prefix}{key}.", inner, keys_of(inner))
    return lines


def _inner_section(schema: Schema) -> Schema:
    options = resolve(schema).get("anyOf", [schema])
    return next(resolve(option) for option in options if keys_of(option))


def _or_null(schema: Schema) -> str:
    return (
        "Left out or `null`: none." if "anyOf" in schema and schema.get("default") is None else ""
    )


def _row(name: str, schema: Schema, is_required: bool) -> str:
    default = "required" if is_required else f"`{_default(schema)}`"
    cells = [f"`{name}`", describe(schema), default, schema.get("description", "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(schema: Schema) -> str:
    default: Any = schema.get("default")
    if isinstance(default, list):
        return "[" + ", ".join(write_scalar(item) for item in default) + "]"
    if isinstance(default, dict):
        return "{}"
    return write_scalar(default)


def documents(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield each generated document of a folder, with the text that it should have."""
    page = folder / "job-file.md"
    introduction = page.read_text(encoding="utf-8").partition(MARKER)[0]
    yield page, f"{introduction}{MARKER}\n\n{job_reference()}"
    yield folder / "job-file.schema.json", json.dumps(job_schema(), indent=2) + "\n"


if __name__ == "__main__":
    for path, text in documents(Path(sys.argv[1])):
        path.write_text(text, encoding="utf-8")
        print(path)
