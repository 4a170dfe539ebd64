"""A `gangline` command that runs on a host of the lab, with its output in files."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gangline.orchestrator.errors import LabError
from gangline.orchestrator.lab_host import Host
from gangline.orchestrator.scenario_record import wait_until

Json = dict[str, Any]

_TICK_S = 0.02
_END_TIMEOUT_S = 15.0


class LabCommand:
    """One run of `gangline WORDS --json`; `files` is where its output goes, less the suffixes."""

    def __init__(self, host: Host, files: Path, words: Sequence[str]) -> None:
        self._host, self._output = host, files.with_suffix(".ndjson")
        self._errors = files.with_suffix(".err")
        self._run_dir: Path | None = None
        command = [sys.executable, "-m", "gangline.orchestrator.cli", "--json", *words]
        self.started_at = time.time()
        self.wall_s = 0.0
        with self._output.open("wb") as out, self._errors.open("wb") as err:
            self._process = host.popen(
                command, cwd=files.parent, stdout=out, stderr=err, start_new_session=True
            )

    def has_run_dir(self) -> bool:
        """Tell whether the run has a folder by now."""
        if self._run_dir is None:
            with self._output.open("rb") as lines:
                first = lines.readline()
            if first.endswith(b"\n"):
                inside = json.loads(first)["run_dir"]
                # A folder on the host's own disk is seen from here below /proc.
                is_own = inside.startswith(str(self._host.scratch))
                self._run_dir = self._host.path(inside) if is_own else Path(inside)
        return self._run_dir is not None

    @property
    def run_dir(self) -> Path:
        """The run's folder as seen from here.

        Raises: LabError when the command never made one.
        """
        if not self.has_run_dir():
            raise LabError(f"the run has not begun: {self.last_error() or 'it says nothing'}")
        assert self._run_dir is not None
        return self._run_dir

    def wait(self, timeout_s: float, look: Callable[[], None]) -> int | None:
        """Wait for the end, calling `look` often; return the exit code, None after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while self._process.poll() is None:
            if time.monotonic() > deadline_s:
                self.wall_s = time.time() - self.started_at
                return None
            look()
            time.sleep(_TICK_S)
        self.wall_s = time.time() - self.started_at
        return int(self._process.returncode)

    def end(self) -> None:
        """End the command, if it still runs: as a user would, then by force."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
                wait_until(lambda: self._process.poll() is not None, _END_TIMEOUT_S)

    def result(self) -> Json:
        """Return the command's last word on the job, {} where it had none."""
        for line in reversed(self._output.read_text(errors="replace").splitlines()):
            record: Json = json.loads(line)
            if record.get("type") == "result":
                return record
        return {}

    def document(self) -> Json:
        """Return the one JSON object that a command printed, {} if it printed none."""
        try:
            found: Json = json.loads(self._output.read_text())
        except ValueError:
            return {}
        return found

    def last_error(self) -> str:
        """Return the message of the error with which the command ended, or nothing."""
        lines = self._errors.read_text(errors="replace").splitlines()
        for line in reversed(lines):
            try:
                return str(json.loads(line)["message"])
            except (ValueError, KeyError, TypeError):
                continue
        return lines[-1] if lines else ""
