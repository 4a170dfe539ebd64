"""How far an uploader has got in a spool, and what it has learned about its target.

One cursor file per target, so that the same spool can be delivered to a second server later. A
cursor is replaced atomically but not fsynced: after a power cut an older or unreadable one only
means that some records are sent again, which the store recognises (see `mlflow_store`).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gangline.monitoring.redaction import redact_uri


@dataclass(frozen=True, order=True)
class Position:
    """A place in a spool: segment number, byte offset in it, last sequence number before it."""

    segment: int = 0
    offset: int = 0
    seq: int = 0


@dataclass
class Cursor:
    """The durable state of one uploader.

    `runs` maps a generation ("" for the job itself) to the store's id of its run; `job` holds what
    is needed to open further ones; `num_dropped` counts the records that the spool had to drop;
    `postponed` are the artifacts that could not be uploaded in their turn.
    """

    path: Path
    position: Position = Position()
    runs: dict[str, str] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    num_dropped: int = 0
    postponed: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, root: Path, uri: str) -> Cursor:
        """Read the cursor of the target `uri`; start at the beginning if there is none."""
        path = cursor_path(root, uri)
        state = _read_json(path)
        return cls(
            path,
            _position_of(state),
            dict(state.get("runs", {})),
            dict(state.get("job", {})),
            int(state.get("num_dropped", 0)),
            list(state.get("postponed", [])),
        )

    def save(self, uri: str) -> None:
        """Replace the cursor file atomically."""
        position = self.position
        state = {
            "target": redact_uri(uri),
            "position": [position.segment, position.offset, position.seq],
            "runs": self.runs,
            "job": self.job,
            "num_dropped": self.num_dropped,
            "postponed": self.postponed,
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self.path)


def cursor_path(root: Path, uri: str) -> Path:
    """Return the cursor file of a target; credentials in the URI do not change it."""
    return root / f"cursor-{hashlib.sha256(redact_uri(uri).encode()).hexdigest()[:12]}.json"


def delivered_positions(root: Path) -> list[Position]:
    """Return the positions of all targets of a spool."""
    return [_position_of(_read_json(path)) for path in sorted(root.glob("cursor-*.json"))]


def num_delivered(root: Path, uri: str) -> tuple[int, int]:
    """Return up to which sequence number the target has the spool, and how many are postponed."""
    state = _read_json(cursor_path(root, uri))
    return _position_of(state).seq, len(state.get("postponed", []))


def _position_of(state: dict[str, Any]) -> Position:
    numbers = state.get("position")
    if isinstance(numbers, list) and len(numbers) == 3 and all(type(n) is int for n in numbers):
        return Position(*numbers)
    return Position()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
