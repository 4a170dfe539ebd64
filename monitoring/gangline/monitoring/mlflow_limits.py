"""Fit settings, tags, data sets and errors into what MLflow accepts; knows no MLflow itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from gangline.monitoring.redaction import redact_userinfo

MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
MAX_KEY_CHARS = 250
MAX_DIGEST_CHARS = 36
MAX_ITEMS_PER_REQUEST = 100
# A request may have 1 MB; a hundred settings of 6000 characters come near it in UTF-8.
MAX_CHARS_PER_REQUEST = 200_000


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Return nested settings as `{"model.dim": "128"}`; lists and other leaves as JSON.

    Passwords in URIs are masked: what is recorded is read by more people than the job file.
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, str):
            flat[name] = redact_userinfo(value)
        else:
            flat[name] = redact_userinfo(json.dumps(value, default=str))
    return flat


def safe_key(key: str) -> str:
    """Return `key` with what MLflow refuses in names replaced by `_`."""
    clean = re.sub(r"[^A-Za-z0-9_./: -]", "_", key)[:MAX_KEY_CHARS].strip("/")
    # A name must not resolve to another one when it is read as a path.
    clean = re.sub(r"//+", "/", clean)
    parts = [part if part.strip(".") else "_" for part in clean.split("/")]
    return "/".join(parts)


def truncate(text: str, max_chars: int) -> str:
    """Return `text`, or its beginning and a remark that says how long it was."""
    if len(text) <= max_chars:
        return text
    remark = f" [cut: {len(text)} characters; whole in job.yaml]"
    return text[: max_chars - len(remark)] + remark


def batches(values: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Split settings or tags into requests of a size that MLflow takes."""
    batch: dict[str, str] = {}
    num_chars = 0
    for key, value in values.items():
        item_chars = len(key) + len(value)
        full = len(batch) == MAX_ITEMS_PER_REQUEST or num_chars + item_chars > MAX_CHARS_PER_REQUEST
        if batch and full:
            yield batch
            batch, num_chars = {}, 0
        batch[key] = value
        num_chars += item_chars
    if batch:
        yield batch


def dataset_fields(dataset: Mapping[str, object]) -> dict[str, str]:
    """Return name, digest, source and profile of MLflow's data-set record.

    MLflow cuts digests at 36 characters; the whole digest stands in the source.
    """
    digest = str(dataset.get("digest", ""))
    path = str(dataset.get("path", ""))
    profile = {k: v for k, v in dataset.items() if k not in ("path", "digest", "name")}
    return {
        "name": str(dataset.get("name") or Path(path).stem or "tokens")[:500],
        "digest": digest[:MAX_DIGEST_CHARS],
        "source_type": "local",
        "source": json.dumps({"uri": path, "digest": digest}),
        "profile": json.dumps(profile, default=str),
    }
