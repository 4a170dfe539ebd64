"""Follow a run's folder while a scenario plays, and count afterwards what it took and stored."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gangline.orchestrator.errors import LabError
from gangline.orchestrator.faults import Progress
from gangline.orchestrator.follow import LineReader
from gangline.orchestrator.timeline import LinkSeries, Timeline
from gangline.trainers.ledger import read_ledger

if TYPE_CHECKING:
    from gangline.orchestrator.lab_links import Link

Json = dict[str, Any]

_COUNT_EVERY_S = 0.2
_STEP_FIELDS = ("generation", "step", "time", "step_s", "loss", "committed")
_CHECKPOINT_FIELDS = ("step", "status", "reason", "time")


class RunReader:
    """Read the journal and the step logs of a run as they grow."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.events: list[Json] = []
        self.steps: list[Json] = []
        self.checkpoints: list[Json] = []
        self._journal = LineReader(run_dir / "journal.jsonl")
        self._logs: dict[str, LineReader] = {}

    def poll(self) -> None:
        """Take in what is new."""
        self.events += [json.loads(line) for line in self._journal.read()]
        folder = self.run_dir / "steps"
        for path in sorted(folder.glob("generation-*.jsonl")):
            reader = self._logs.setdefault(path.name, LineReader(path))
            generation = int(path.stem.partition("-")[2])
            for line in reader.read():
                self._take(json.loads(line), generation)

    def _take(self, line: Json, generation: int) -> None:
        if line["kind"] == "step":
            self.steps.append({field: line[field] for field in _STEP_FIELDS})
        elif line["kind"] == "checkpoint":
            kept = {field: line[field] for field in _CHECKPOINT_FIELDS}
            self.checkpoints.append({"generation": generation, **kept})

    def close(self) -> None:
        """Close the files."""
        for reader in (self._journal, *self._logs.values()):
            reader.close()

    def progress(self, started_s: float) -> Progress:
        """Return how far the run is."""
        first = min((step["time"] for step in self.steps), default=None)
        newest = max((step["step"] for step in self.steps), default=0)
        warming = {
            event["worker_id"] for event in self.events if event["event"] == "worker_created"
        }
        for event in self.events:
            if event["event"] in ("worker_ready", "worker_ended"):
                warming.discard(event["worker_id"])
        return Progress(started_s, first, newest, is_staffed=not warming)

    def fill(self, timeline: Timeline) -> None:
        """Put what was read into a timeline; the last end of the run counts."""
        timeline.events, timeline.steps = self.events, self.steps
        timeline.checkpoints = self.checkpoints
        timeline.state, timeline.reason, timeline.weights_sha256 = end_of(self.events)


def end_of(events: Iterable[Json]) -> tuple[str, str, str]:
    """Return how a run ended by its journal: state, reason, digest of the weights."""
    finished = [event for event in events if event["event"] == "finished"]
    if not finished:
        return "", "", ""
    last = finished[-1]
    result = last.get("result") or {}
    return last["state"], last["reason"], result.get("weights_sha256", "")


class LinkWatch(threading.Thread):
    """Read the counters of all links, some times a second."""

    def __init__(self, links: dict[str, Link]) -> None:
        super().__init__(name="link counters", daemon=True)
        self._links = links
        self._stop_asked = threading.Event()
        self.series = {name: LinkSeries(link.rate_mbit) for name, link in links.items()}

    def run(self) -> None:
        """Read until asked to stop."""
        while True:
            self._read()
            if self._stop_asked.wait(_COUNT_EVERY_S):
                self._read()
                return

    def stop(self) -> dict[str, LinkSeries]:
        """Stop reading; return what was read."""
        self._stop_asked.set()
        self.join()
        return self.series

    def _read(self) -> None:
        for name, link in self._links.items():
            try:
                found = link.num_bytes()
            except LabError:
                continue  # a host at its end is dead, which ends its line in the picture
            series = self.series[name]
            series.times.append(time.time())
            series.egress_bytes.append(found.a_to_b)
            series.ingress_bytes.append(found.b_to_a)


def count_samples(ledger: Path, num_steps: int, batch_size: int) -> Json:
    """Compare the samples that a run took with the ones that it had to take.

    Every step has to take `batch_size` samples. A sample that occurs twice is in order only where
    it occurs in a second epoch, which the short runs of scenarios do not reach.
    """
    try:
        taken = read_ledger(ledger)
    except FileNotFoundError:
        taken = {}
    times = Counter(sample for samples in taken.values() for sample in samples)
    num_expected = num_steps * batch_size
    num_taken = sum(times.values())
    return {
        "num_expected": num_expected,
        "num_taken": num_taken,
        "num_missing": sum(
            max(0, batch_size - len(taken.get(step, ()))) for step in range(1, num_steps + 1)
        ),
        "num_repeated": sum(count - 1 for count in times.values()),
    }


def wait_until(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.05) -> bool:
    """Wait until a condition holds; return whether it did in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(every_s)
    return True
