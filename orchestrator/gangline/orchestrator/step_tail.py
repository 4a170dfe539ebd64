"""Read what rank 0 of the current generation writes of its steps (`train_program.StepLog`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gangline.orchestrator.train_program import step_log_path

Json = dict[str, Any]


class StepTail:
    """Follow the step log of one generation; lines come whole, in order and once."""

    def __init__(self, run_dir: Path, generation: int) -> None:
        self.generation = generation
        self._path = step_log_path(run_dir, generation)
        self._offset = 0

    def read(self) -> list[Json]:
        """Return the lines written since the last call; [] while there are none."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content.rfind(b"\n") + 1
        self._offset += whole
        return [json.loads(line) for line in content[:whole].splitlines()]
