"""What every command takes and how every command speaks: data on stdout, the rest on stderr."""

from __future__ import annotations

import json as json_module
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

_GLOBAL = Group("Everywhere", sort_key=90)


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """The options of every command."""

    json: Annotated[
        bool, Parameter(name="--json", group=_GLOBAL, help="Print JSON (a stream: NDJSON).")
    ] = False
    runs: Annotated[
        Path | None,
        Parameter(
            name="--runs",
            group=_GLOBAL,
            help="Folder of the job table, and of new runs. Without it ./runs, and a job's "
            "storage.root.",
        ),
    ] = None
    quiet: Annotated[
        bool,
        Parameter(name=["--quiet", "-q"], group=_GLOBAL, help="Say only the result and errors."),
    ] = False
    color: Annotated[
        bool,
        Parameter(
            name="--color",
            negative="--no-color",
            group=_GLOBAL,
            help="Colours on a terminal; NO_COLOR in the environment turns them off too.",
        ),
    ] = True
    traceback: Annotated[
        bool,
        Parameter(
            name="--traceback", group=_GLOBAL, help="Show the traceback of an unexpected error."
        ),
    ] = False

    def wants_color(self) -> bool:
        """Say whether to use colours on a terminal."""
        return self.color and not os.environ.get("NO_COLOR")

    def note(self, text: str) -> None:
        """Tell the user something that is not the result."""
        if not self.quiet:
            # A terminal or a pipe that has gone must not end a job.
            with suppress(OSError):
                print(f"gangline: {text}", file=sys.stderr, flush=True)

    def data(self, text: str) -> None:
        """Print a line of the result."""
        print(text, flush=True)

    def data_json(self, value: Any, *, indent: int | None = 2) -> None:
        """Print a result as JSON; `indent` None keeps it on one line, for streams."""
        print(json_module.dumps(value, indent=indent), flush=True)


JobName = Annotated[
    str,
    Parameter(help="Run id, a beginning of one, a name (its newest run), or @last."),
]
Overrides = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        help="Set a field of the job file, e.g. --set training.steps=100; may be repeated.",
    ),
]
