"""SIGKILL at random instants: no acknowledged step may be lost, nothing torn may load.

A case is one folder and two children, one after the other: each saves step after step and tells
each acknowledged step through a pipe, until it is killed after a time that the case's seed draws.
The second child must go on from what the first one left.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gangline.orchestrator.bench_checkpoint_subjects import (
    Ours,
    SaveFailedError,
    Subject,
    end_child,
    fork_child,
    fresh,
)

CHILDREN_PER_CASE = 2


@dataclass
class Tally:
    """Count what came of the faults of one kind, for one subject."""

    num_faults: int = 0
    num_acknowledged: int = 0  # steps, over all children
    outcomes: Counter[str] = field(default_factory=Counter)  # "ok", "lost", "torn", "unloadable"
    failures: list[str] = field(default_factory=list)  # one line each, with seed or place
    seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    def add(self, outcome: str, detail: str = "") -> None:
        """Count one outcome; keep the line of one that is not "ok"."""
        self.outcomes[outcome] += 1
        if outcome != "ok" and len(self.failures) < 20:
            self.failures.append(detail)

    def to_json(self) -> dict[str, Any]:
        return {
            "num_faults": self.num_faults,
            "num_acknowledged": self.num_acknowledged,
            "outcomes": dict(self.outcomes),
            "failures": self.failures,
            "seconds": round(self.seconds, 1),
            **self.more,
        }

    def is_clean(self) -> bool:
        """Tell whether faults happened, progress was made, and nothing was lost."""
        return (
            self.num_faults > 0
            and self.num_acknowledged > 0
            and set(self.outcomes) == {"ok"}
            and self.outcomes["ok"] == self.num_faults
        )


def classify(subject: Subject, root: Path, acknowledged: int) -> tuple[str, str]:
    """Judge a folder after a fault: "ok", "lost", "torn" or "unloadable", and why."""
    found = subject.find(root)
    if found.step is None:
        return ("unloadable" if acknowledged else "ok"), found.problem
    if found.problem:
        return "torn", found.problem
    if found.step < acknowledged:
        return "lost", f"found step {found.step}, acknowledged {acknowledged}"
    return "ok", ""


def run_kills(subject: Subject, work: Path, *, seed: int, num_kills: int, first: int = 0) -> Tally:
    """Run cases until `num_kills` children were killed."""
    tally = Tally()
    started_s = time.monotonic()
    inside = 0
    case = first
    while tally.num_faults < num_kills:
        inside += _run_case(subject, fresh(work / "kills"), seed, case, tally)
        case += 1
        if case - first > 2 * num_kills:
            tally.add("invalid", f"only {tally.num_faults} children of {case} cases were killed")
            break
    tally.seconds = time.monotonic() - started_s
    tally.more["kills_inside_a_save"] = inside
    return tally


def _run_case(subject: Subject, root: Path, seed: int, case: int, tally: Tally) -> int:
    rng = random.Random(f"{seed}-{case}")  # noqa: S311 - a replayable draw, not a secret
    if isinstance(subject, Ours):
        subject = Ours(asynchronous=rng.random() < 0.5, num_elements=subject.num_elements)
    acknowledged, num_inside = 0, 0
    for generation in range(1, CHILDREN_PER_CASE + 1):
        delay_s = rng.uniform(0.002, 0.150)
        was_killed, steps = _kill_one(subject, root, generation, acknowledged, delay_s)
        tally.num_acknowledged += len(steps)
        acknowledged = max([acknowledged, *steps])
        where = f"case {case}, child {generation}, {delay_s * 1e3:.1f} ms"
        if not was_killed:
            tally.num_faults += 1
            tally.add("child failed", f"{where}: ended by itself")
            break
        tally.num_faults += 1
        # An attempt that was not finished is the trace of a kill inside a save.
        num_inside += any(root.glob(".tmp-*")) or any(root.glob("*/.metadata.tmp"))
        outcome, why = classify(subject, root, acknowledged)
        tally.add(outcome, f"{where}: {why}; {replay(seed, case)}")
        if outcome != "ok":
            break
    return num_inside


def replay(seed: int, case: int) -> str:
    """Say how to run one case again."""
    return (
        "again: python -m gangline.orchestrator.bench_checkpoint --only kill "
        f"--seed {seed} --first {case} --kills {CHILDREN_PER_CASE}"
    )


def _kill_one(
    subject: Subject, root: Path, generation: int, last_step: int, delay_s: float
) -> tuple[bool, list[int]]:
    """Fork a child that saves in a loop, kill it, and return whether, and what it acknowledged."""
    read_end, write_end = os.pipe()
    pid = fork_child()
    if pid == 0:
        try:
            session = subject.start(root, generation)
            os.write(write_end, b"0\n")  # ready: the time to the kill begins
            for step in range(last_step + 1, last_step + 10_000):
                session.save(step)
                os.write(write_end, b"%d\n" % step)
        except (SaveFailedError, OSError) as error:
            os.write(write_end, f"# {error}\n".encode())
        finally:
            end_child(1)
    os.close(write_end)
    os.read(read_end, 2)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    told = b""
    while block := os.read(read_end, 1 << 16):
        told += block
    os.close(read_end)
    steps = [int(line) for line in told.split(b"\n") if line.isdigit() and line != b"0"]
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL, steps
