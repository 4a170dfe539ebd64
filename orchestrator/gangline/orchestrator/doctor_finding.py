"""What the doctor reports: one thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `mend` is what to do where it is not ok."""

    check: str
    level: Level
    found: str
    mend: str = ""
