"""A script job for tests: it needs no torch, and what it has done can be counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Does a tick at a time until it has done so many; goes on where it stopped.
SCRIPT = """
import os, pathlib, sys, time
place = pathlib.Path(os.environ["GANGLINE_RUN_DIR"]) / f"tick-{os.environ['RANK']}"
done = int(place.read_text()) if place.exists() else 0
print("the variable has", len(os.environ.get("CANARY", "")), "characters")
for tick in range(done, int(sys.argv[1])):
    print("tick", tick, flush=True)
    (place.parent / f".{place.name}").write_text(str(tick + 1))
    os.replace(place.parent / f".{place.name}", place)
    time.sleep(0.05)
print("bye")
"""
JOB = """
kind: script
name: ticks
script: ticks.py
args: [{num_ticks}]
env_from: [CANARY]
workers: {{count: 2, cpus: 1}}
tracking: {{enabled: false}}
faults: {{grace_s: 2}}
"""
CANARY = "canary-5f0c27"


def ticks_in(log: str) -> list[int]:
    """Return the ticks of a log; one that was printed again after a kill counts once."""
    ticks = [int(line.split()[-1]) for line in log.splitlines() if "tick " in line]
    return list(dict.fromkeys(ticks))


class Shell:
    """`gangline` commands in a folder with the job, each a process of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.err = ""
        self._processes: list[subprocess.Popen[str]] = []
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = {**inherited, **environment, "CANARY": CANARY}
        (folder / "ticks.py").write_text(SCRIPT)
        self.write_job(num_ticks=40)

    def write_job(self, num_ticks: int) -> None:
        (self.folder / "ticks.yaml").write_text(JOB.format(num_ticks=num_ticks))

    def start(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "gangline.orchestrator.cli", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End what a failed test has left running; a driver ends with its command."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
                process.communicate()

    def __call__(self, *words: str, code: int = 0) -> str:
        """Run a command to its end, which must be this exit code; return its stdout."""
        process = self.start(*words)
        out, self.err = process.communicate(timeout=120)
        assert process.returncode == code, f"{words}: {out}\n{self.err}"
        assert "Traceback" not in self.err
        return out

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))

    def started(self, *words: str) -> tuple[subprocess.Popen[str], str]:
        """Start a command that streams JSON; return it and the run id it tells first."""
        process = self.start(*words, "--json")
        assert process.stdout is not None, "the stream is piped"
        return process, json.loads(process.stdout.readline())["run_id"]

    def until(self, run_id: str, state: str) -> dict[str, Any]:
        deadline_s = time.monotonic() + 90.0
        while True:
            info: dict[str, Any] = self.json("show", run_id)
            if info["state"] == state:
                return info
            assert time.monotonic() < deadline_s, info
            time.sleep(0.5)

    def ticks_of(self, run_id: str, *, more_than: int = 0) -> int:
        """Wait until rank 0 has done more ticks than that; return how many."""
        place = self.folder / "runs" / run_id / "tick-0"
        deadline_s = time.monotonic() + 90.0
        while not (place.exists() and int(place.read_text()) > more_than):
            assert time.monotonic() < deadline_s, "the script does not tick"
            time.sleep(0.1)
        return int(place.read_text())
