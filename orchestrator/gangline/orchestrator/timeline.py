"""What happened in a scenario: one value, written as JSON, from which all is judged and drawn.

    Timeline    the run's events and steps, the faults with their proofs, the links' counters

All times are unix seconds of the one machine that the lab is on, so they can be compared. Reading
the records of a run is in `scenario_record`, the picture in `timeline_plot`.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

VERSION = 1
# The first steps of a generation pay for cold caches and connections, and say nothing of a link.
_NUM_COLD_STEPS = 3


@dataclass(frozen=True)
class Proof:
    """One observation that a fault happened, or was taken back."""

    what: str
    found: str
    holds: bool


@dataclass
class FaultRecord:
    """One fault as it went. `begun_at` None: its moment never came. `ended_at` None: never ended.

    `is_left_out` marks a fault of `--without-faults`: its times are those that it would have had.
    """

    label: str
    kind: str
    target: str
    rank: int | None = None  # that it hit, where it hit one
    host: str | None = None
    links: list[str] = field(default_factory=list)
    begun_at: float | None = None
    ended_at: float | None = None
    proofs: list[Proof] = field(default_factory=list)
    error: str = ""
    lasts: bool = False  # it is a kind of fault that is taken back
    is_left_out: bool = False

    @property
    def doubt(self) -> str:
        """Return why it is not certain that the fault happened; empty where it is proven."""
        if self.is_left_out:
            return "it was left out"
        if self.error:
            return self.error
        if self.begun_at is None:
            return "its moment never came"
        failed = [f"{proof.what}: {proof.found}" for proof in self.proofs if not proof.holds]
        if not self.proofs:
            return "nothing proves it"
        return "; ".join(failed)


@dataclass
class LinkSeries:
    """The bytes that the two ends of a link have sent so far, at some instants."""

    rate_mbit: float | None
    times: list[float] = field(default_factory=list)
    egress_bytes: list[int] = field(default_factory=list)  # by the first end of the link's name
    ingress_bytes: list[int] = field(default_factory=list)  # by the second

    def sent_bytes(self, direction: str, begin: float, end: float) -> int:
        """Return what was sent in one direction, or in `both`, between two instants.

        From the first reading of the counters that is not before `begin` to the last that is not
        after `end`: what is counted was sent in between.
        """
        first = bisect.bisect_left(self.times, begin)
        last = bisect.bisect_right(self.times, end) - 1
        if last <= first:
            return 0
        counts = {"egress": self.egress_bytes, "ingress": self.ingress_bytes}
        return sum(c[last] - c[first] for name, c in counts.items() if direction in (name, "both"))


@dataclass
class Timeline:
    """All that is known of one run of a scenario."""

    scenario: str
    started_at: float
    hosts: list[str]
    command_started_at: float = 0.0
    command_ended_at: float = 0.0
    # Of the `gangline run` in the lab. exit_code None: it was ended at the scenario's deadline.
    exit_code: int | None = None
    state: str = ""
    reason: str = ""
    num_steps: int | None = None
    weights_sha256: str = ""
    events: list[Json] = field(default_factory=list)
    steps: list[Json] = field(default_factory=list)
    checkpoints: list[Json] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    links: dict[str, LinkSeries] = field(default_factory=dict)
    # Where asked for: of the run without faults, of the resume, of the samples, of MLflow.
    twin: Json | None = None
    resumed: Json | None = None
    samples: Json | None = None
    metrics: Json | None = None
    leftovers: list[str] = field(default_factory=list)
    durations_s: dict[str, float] = field(default_factory=dict)
    failures: list[Json] = field(default_factory=list)  # what the judge found wrong

    def events_of(self, *names: str) -> list[Json]:
        """Return the events of the run that have one of these names, in order."""
        return [event for event in self.events if event["event"] in names]

    def fault(self, label: str) -> FaultRecord:
        """Return the fault of this label."""
        return next(fault for fault in self.faults if fault.label == label)

    def end_of(self, fault: FaultRecord) -> float:
        """Return when a fault ended: when it was taken back, or with the command.

        A kill has no end: what it leads to counts as its time.
        """
        return fault.ended_at if fault.ended_at is not None else self.command_ended_at


def save(timeline: Timeline, path: Path) -> None:
    """Write a timeline as JSON."""
    path.write_text(json.dumps({"version": VERSION, **dataclasses.asdict(timeline)}, indent=1))


def load(path: Path) -> Timeline:
    """Read what `save` wrote.

    Raises: ValueError for another version.
    """
    values = json.loads(path.read_text())
    if values.pop("version", None) != VERSION:
        raise ValueError(f"{path} is not a timeline of version {VERSION}; run the scenario again")
    values["faults"] = [
        FaultRecord(**{**fault, "proofs": [Proof(**proof) for proof in fault["proofs"]]})
        for fault in values["faults"]
    ]
    values["links"] = {name: LinkSeries(**series) for name, series in values["links"].items()}
    return Timeline(**values)


@dataclass(frozen=True)
class StepTimes:
    """Durations of steps before, during and after a fault, in seconds; the cold ones left out."""

    before_s: list[float]
    during_s: list[float]
    after_s: list[float]


def step_times(timeline: Timeline, fault: FaultRecord) -> StepTimes:
    """Sort the steps by where they stand to a fault.

    A step is *during* it when the two overlap. The step after the last one during it is left out:
    it may still pay for what queued up.
    """
    times = StepTimes([], [], [])
    if fault.begun_at is None:
        return times
    end = timeline.end_of(fault)
    num_of_generation: dict[int, int] = {}
    is_first_after = True
    for step in timeline.steps:
        number = num_of_generation[step["generation"]] = (
            num_of_generation.get(step["generation"], 0) + 1
        )
        begin_of_step = step["time"] - step["step_s"]
        if step["time"] <= fault.begun_at:
            if number > _NUM_COLD_STEPS:
                times.before_s.append(step["step_s"])
        elif begin_of_step < end:
            times.during_s.append(step["step_s"])
        elif is_first_after:
            is_first_after = False
        elif number > _NUM_COLD_STEPS:
            times.after_s.append(step["step_s"])
    return times


def median(values: Sequence[float]) -> float:
    """Return the median, or NaN where there is no value."""
    return statistics.median(values) if values else math.nan


@dataclass(frozen=True)
class Tenure:
    """The time for which one worker was one rank."""

    worker_id: str
    host: str
    rank: int
    generation: int
    begin: float
    end: float


def tenures(timeline: Timeline) -> list[Tenure]:
    """Return who was which rank, where and when, as the journal has it."""
    host_of: dict[str, str] = {}
    running: dict[str, tuple[int, int, float]] = {}
    found: list[Tenure] = []

    def close(worker_id: str, end: float) -> None:
        rank, generation, begin = running.pop(worker_id)
        host = host_of.get(worker_id, "?")
        found.append(Tenure(worker_id, host, rank, generation, begin, end))

    for event in timeline.events:
        match event["event"]:
            case "worker_ready":
                host_of[event["worker_id"]] = event["info"]["host"]
            case "worker_ended" if event["worker_id"] in running:
                close(event["worker_id"], event["time"])
            case "failure" | "finished" | "session_started":
                for worker_id in list(running):
                    close(worker_id, event["time"])
            case "generation_started":
                for rank, worker_id in enumerate(event["ranks"]):
                    running[worker_id] = (rank, event["generation"], event["time"])
    for worker_id in list(running):
        close(worker_id, timeline.command_ended_at)
    return sorted(found, key=lambda tenure: (tenure.generation, tenure.rank))
