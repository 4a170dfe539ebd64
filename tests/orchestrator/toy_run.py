"""Run toy programs under the real controller and a private Ray, in a process of its own.

    python toy_run.py RUN_DIR '{"num_steps": 100, "spec": {"num_spares": 0}}'

prints the records of the run as NDJSON; the last line is the final state. A process per run,
because Ray takes its settings once per process.
"""

import functools
import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def main(run_dir: Path, options: dict) -> None:
    import toy_program  # type: ignore[import-not-found]

    from gangline.orchestrator import driver
    from gangline.orchestrator.cluster import connect
    from gangline.orchestrator.run_spec import RunSpec, no_fence

    fields = {
        "run_id": run_dir.name,
        "name": "toy",
        "kind": "train",
        "session": uuid.uuid4().hex,
        "run_dir": run_dir,
        "num_workers": 2,
        "num_spares": 1,
        "min_workers": None,
        "legal_sizes": (1, 2),
        "bundle": {"CPU": 1.0},
        "max_failures": 5,
        "restart_in_place": True,
        "hang_timeout_s": 3.0,
        "grace_s": 5.0,
        "placement_timeout_s": 20.0,
        "num_steps": options["num_steps"],
        "fence": no_fence,
        "make_tracking": toy_program.NoTracking,
        **options.get("spec", {}),
    }
    raise_at = tuple(tuple(place) for place in options.get("raise_at", ()))
    toy = toy_program.ToySpec(run_dir, options["num_steps"], raise_at=raise_at)
    spec = RunSpec(make_program=functools.partial(toy_program.ToyProgram, toy), **fields)
    interrupted = threading.Event()
    with connect(None, namespace=run_dir.name, min_cpus=4):
        driver._listen_to_signals(interrupted)
        cancel = driver._CancelWatch(run_dir, interrupted)
        final = driver._drive(spec, cancel, lambda record: print(json.dumps(record), flush=True))
    print(json.dumps({"type": "final", **final}), flush=True)


class ToyRun:
    """A run in a child process, with what it printed. `act(record)` may do harm meanwhile."""

    def __init__(
        self, run_dir: Path, act: Callable[[dict, "ToyRun"], None] | None = None, **options
    ) -> None:
        for name in ("logs", "control"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, str(run_dir), json.dumps(options)]
        self.run_dir = run_dir
        self.records: list[dict] = []
        self.harmed: list[Any] = []
        self.start_s = time.time()
        with open(run_dir / "stderr", "w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith("{"):
                continue  # Ray's own words
            record = json.loads(line)
            self.records.append(record)
            if act is not None:
                act(record, self)
        self.process.wait()

    @property
    def errors(self) -> str:
        return (self.run_dir / "stderr").read_text()

    @property
    def final(self) -> dict:
        return self.records[-1]

    def events(self, name: str) -> list[dict]:
        return [r for r in self.records if r["type"] == "event" and r["event"] == name]

    def steps(self) -> list[int]:
        """All steps that any generation logged, in order."""
        lines = []
        for path in sorted((self.run_dir / "steps").iterdir()):
            lines += [json.loads(line) for line in path.read_text().splitlines()]
        return [line["step"] for line in lines]


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
