"""A program without torch whose ranks count steps together, for tests of the orchestrator.

Ranks are tied by files: rank r may do step s only when every rank has done step s - 1, and a peer
that makes no progress for `peer_timeout_s` is reported lost. State is one committed step in a
file, as a checkpoint would be.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from gangline.comm.errors import PeerLostError
from gangline.orchestrator.train_program import StepLog


@dataclass(frozen=True)
class ToySpec:
    run_dir: Path
    num_steps: int
    step_s: float = 0.02
    peer_timeout_s: float = 0.5
    raise_at: tuple = ()  # (rank, step, generation)


class ToyProgram:
    def __init__(self, spec: ToySpec) -> None:
        self.spec = spec

    def prepare(self) -> dict:
        return {"prepared_by": os.getpid()}

    def warm(self, shared: dict) -> None:
        assert shared["prepared_by"] > 0

    def open_store(self, world_size: int, host: str) -> int:
        return 1

    def run(self, assignment, control) -> dict:
        spec = self.spec
        meet = spec.run_dir / "meet" / str(assignment.generation)
        meet.mkdir(parents=True, exist_ok=True)
        committed = spec.run_dir / "committed"
        step = int(committed.read_text()) if committed.exists() else 0
        others = [meet / str(r) for r in range(assignment.world_size) if r != assignment.rank]
        with StepLog(spec.run_dir, assignment.generation, assignment.rank) as log:
            while step < spec.num_steps:
                if control.should_stop.is_set():
                    return {"step": step, "stopped": True}
                step += 1
                time.sleep(spec.step_s)
                if (assignment.rank, step, assignment.generation) in spec.raise_at:
                    raise ValueError(f"planted at step {step}")
                (meet / f".{assignment.rank}").write_text(str(step))
                (meet / f".{assignment.rank}").replace(meet / str(assignment.rank))
                self.wait_for(others, step, control)
                if assignment.rank == 0 and step % 5 == 0:
                    committed.write_text(str(step))
                control.progress(step)
                print(f"step {step}")
                log.write(
                    "step",
                    {
                        "generation": assignment.generation,
                        "step": step,
                        "loss": 1.0 / step,
                        "num_tokens": 10,
                        "step_s": spec.step_s,
                        "time": time.time(),
                    },
                )
        return {"step": step, "stopped": False}

    def wait_for(self, others: list, step: int, control) -> None:
        deadline_s = time.monotonic() + self.spec.peer_timeout_s
        while not all(o.exists() and int(o.read_text()) >= step for o in others):
            if control.should_stop.is_set() or time.monotonic() > deadline_s:
                raise PeerLostError(
                    op="wait", axis="world", rank=0, elapsed_s=0.0, detail="no progress"
                )
            time.sleep(0.002)


class NoTracking:
    """Stands in for MLflow: these tests are about the controller."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None
