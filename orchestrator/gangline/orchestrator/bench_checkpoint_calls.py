"""A fault at every file-system call of a save: SIGKILL, no space, input/output error.

Two steps are saved first, so that the save under test is an ordinary one, which also removes the
oldest. After a kill, a new generation must find every acknowledged step and go on. After an error,
the save is refused or goes through, what was acknowledged stays, and the next save works.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

from gangline.orchestrator.bench_checkpoint_kill import Tally, classify
from gangline.orchestrator.bench_checkpoint_puppet import Call, Puppet, Traced, calls_of_a_save
from gangline.orchestrator.bench_checkpoint_subjects import Subject, fresh

# Calls that a full or broken disk lets fail, of those that a save makes.
_CAN_FAIL = {
    "openat", "mkdir", "mkdirat", "write", "writev", "pwrite64", "ftruncate", "fsync", "rename",
    "renameat", "renameat2", "statfs", "getdents64", "newfstatat", "close", "unlink", "unlinkat",
}  # fmt: skip


def _prepared(subject: Subject, root: Path) -> Puppet:
    puppet = Puppet(subject, fresh(root), generation=1)
    for step in (1, 2):
        answer = puppet.save(step)
        if answer != "":
            raise RuntimeError(f"{subject.name}: step {step} was not saved: {answer}")
    return puppet


def _list_calls(subject: Subject, work: Path) -> list[Call]:
    puppet = _prepared(subject, work / "calls")
    calls = calls_of_a_save(puppet, 3, work / "strace.log")
    puppet.end()
    return calls


def run_kill_at_every_call(subject: Subject, work: Path, *, only: str | None = None) -> Tally:
    """Kill the child before each call in turn, or before the one named like "fsync#2"."""
    tally = Tally()
    started_s = time.monotonic()
    calls = [c for c in _list_calls(subject, work) if only in (None, str(c))]
    for call in calls:
        root = work / "calls"
        puppet = _prepared(subject, root)
        options = [
            "-e",
            f"trace={call.name}",
            "-e",
            f"inject={call.name}:signal=KILL:when={call.number}",
        ]
        with Traced(puppet, work / "strace.log", options):
            answer = puppet.save(3)
        code = puppet.end()
        if code != -signal.SIGKILL:  # the calls were not the same twice; this place was not tried
            continue
        tally.num_faults += 1
        acknowledged = 3 if answer == "" else 2
        tally.num_acknowledged += acknowledged
        outcome, why = classify(subject, root, acknowledged)
        if outcome == "ok":
            outcome, why = _goes_on(subject, root, acknowledged)
        tally.add(outcome, f"killed before {call}: {why}; {_replay('calls', call)}")
    tally.seconds = time.monotonic() - started_s
    tally.more["calls"] = len(calls)
    return tally


def _goes_on(subject: Subject, root: Path, acknowledged: int) -> tuple[str, str]:
    puppet = Puppet(subject, root, generation=2)
    answer = puppet.save(acknowledged + 2)
    puppet.end()
    if answer != "":
        return "stuck", f"the next generation could not save: {answer}"
    return classify(subject, root, acknowledged + 2)


def run_error_at_every_call(
    subject: Subject, work: Path, error: str, *, only: str | None = None
) -> Tally:
    """Let each call in turn fail once with `error`, a name such as ENOSPC."""
    tally = Tally()
    started_s = time.monotonic()
    calls = [
        call
        for call in _list_calls(subject, work)
        if call.name in _CAN_FAIL and only in (None, str(call))
    ]
    num_refused = 0
    for call in calls:
        root = work / "calls"
        puppet = _prepared(subject, root)
        log = work / "strace.log"
        options = [
            "-e",
            f"trace={call.name}",
            "-e",
            f"inject={call.name}:error={error}:when={call.number}",
        ]
        with Traced(puppet, log, options):
            answer = puppet.save(3)
        if "(INJECTED)" not in log.read_text(errors="replace"):
            puppet.end()
            continue
        tally.num_faults += 1
        num_refused += bool(answer)
        acknowledged = 3 if answer == "" else 2
        tally.num_acknowledged += acknowledged
        outcome, why = classify(subject, root, acknowledged)
        if outcome == "ok" and (next_answer := puppet.save(4)) != "":
            outcome, why = "stuck", f"the next save did not work: {next_answer}"
        if outcome == "ok":
            outcome, why = classify(subject, root, 4)
        if puppet.end() != 0:
            outcome, why = "died", f"the process ended ({answer})"
        tally.add(outcome, f"{error} at {call}: {why}; {_replay('errors', call)}")
    tally.seconds = time.monotonic() - started_s
    tally.more |= {"calls": len(calls), "saves_refused": num_refused}
    return tally


def _inject(call: Call, fault: str) -> list[str]:
    return ["-e", f"trace={call.name}", "-e", f"inject={call.name}:{fault}:when={call.number}"]


def _replay(part: str, call: Call) -> str:
    command = "python -m gangline.orchestrator.bench_checkpoint"
    return f"again: {command} --only {part} --call {call}"
