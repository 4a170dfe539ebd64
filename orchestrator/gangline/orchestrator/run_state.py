"""What a controller knows of its run, rebuilt from the journal alone.

A controller that was killed and started again by Ray, and a `gangline resume` days later, both
begin with `replay`. It is pure, so that every torn sequence of events can be tested.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

TERMINAL_STATES = ("SUCCEEDED", "FAILED", "CANCELLED")


@dataclass
class WorkerState:
    """A worker that the journal knows of. `info` is None until it has been warm once."""

    slot: int
    info: Json | None = None


@dataclass
class RunState:
    """The controller's knowledge. `ranks[r]` is the worker that is rank r of `generation`.

    `workers`, `ranks` and `num_failures` are of the present session only: a session is one start
    by a driver, and its workers live in that driver's cluster.
    """

    session: str = ""
    generation: int = -1
    is_generation_running: bool = False
    shared: Json | None = None
    workers: dict[str, WorkerState] = field(default_factory=dict)
    ranks: list[str] = field(default_factory=list)
    num_failures: int = 0
    num_restarts: int = 0
    num_workers_ever: int = 0
    # The node of every worker that was ever warm: also a lost one is to be named with its node.
    nodes: dict[str, str] = field(default_factory=dict)
    # The failure that is not yet recovered from: its record, and the first one of several.
    failure: Json | None = None
    final: Json | None = None


def replay(events: Iterable[Json]) -> RunState:
    """Rebuild the state after `events` (records of the journal, oldest first)."""
    state = RunState()
    for record in events:
        apply(state, record)
    return state


def apply(state: RunState, record: Json) -> None:
    """Bring `state` up to date with one more record."""
    state.generation = max(state.generation, record["generation"])
    match record["event"]:
        case "session_started":
            state.session = record["session"]
            state.workers.clear()
            state.ranks = []
            state.is_generation_running = False
            state.num_failures = 0
            state.failure = None
            state.final = None
        case "prepared":
            state.shared = record["shared"]
        case "worker_created":
            state.workers[record["worker_id"]] = WorkerState(record["slot"])
            state.num_workers_ever += 1
        case "worker_ready":
            state.workers[record["worker_id"]].info = record["info"]
            state.nodes[record["worker_id"]] = record["info"]["host"]
        case "worker_ended":
            state.workers.pop(record["worker_id"], None)
        case "failure":
            state.is_generation_running = False
            state.num_failures += record["num_lost"]
            state.failure = state.failure or record
        case "generation_started":
            state.ranks = record["ranks"]
            state.is_generation_running = True
        case "recovered":
            state.num_restarts += 1
            state.failure = None
        case "finished":
            state.final = record
