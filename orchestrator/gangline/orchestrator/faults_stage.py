"""What faults act on: the lab, the run's journal, the MLflow server; and what they hand back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gangline.orchestrator.cluster import process_start
from gangline.orchestrator.faults import FaultBase, MlflowDown
from gangline.orchestrator.journal import read_journal
from gangline.orchestrator.timeline import Proof

if TYPE_CHECKING:
    from gangline.orchestrator.lab import Lab
    from gangline.orchestrator.lab_host import Host
    from gangline.orchestrator.lab_links import Link
    from gangline.orchestrator.scenario_mlflow import MlflowServer

_DEATH_TIMEOUT_S = 5.0
_BUSY_S = 0.3


class FaultError(Exception):
    """A fault could not be carried out; the message says why."""


@dataclass(frozen=True)
class WorkerPlace:
    """The worker that is a rank now. `pid` is this machine's, `inner_pid` the host's own."""

    rank: int
    worker_id: str
    host: Host
    pid: int
    inner_pid: int


@dataclass(frozen=True)
class Aim:
    """What a fault is about to hit: in words, and whichever of the parts there are."""

    target: str
    worker: WorkerPlace | None = None
    host: Host | None = None
    links: tuple[Link, ...] = ()

    @property
    def the_worker(self) -> WorkerPlace:
        """Return the worker; only for faults that have one."""
        assert self.worker is not None, "the fault's model asks for a rank"
        return self.worker

    @property
    def the_host(self) -> Host:
        """Return the host; only for faults that have one."""
        assert self.host is not None, "the fault's model asks for a host"
        return self.host


@dataclass
class Begun:
    """A fault that has begun at `at`. `end` takes it back and returns what proves the rest."""

    at: float
    proofs: list[Proof] = field(default_factory=list)
    end: Callable[[], list[Proof]] | None = None


@dataclass
class Stage:
    """Where a scenario plays. `run_dir` is set when the run has a folder, as seen from here."""

    lab: Lab
    note: Callable[[str], None]
    mlflow: MlflowServer | None = None
    run_dir: Path | None = None

    def aim(self, fault: FaultBase) -> Aim:
        """Find what a fault means at this moment.

        Raises: FaultError when there is no such thing now.
        """
        link, host, spine, rank = (
            getattr(fault, field, None) for field in ("link", "host", "spine", "rank")
        )
        if link is not None:
            end = self.lab.links[link].a.network.name
            return Aim(f"link {link}", None, self.lab.hosts.get(end), (self.lab.links[link],))
        if host is not None:
            return Aim(host, None, self.lab.hosts[host])
        if spine is not None:
            spine = self._busiest_spine() if spine == "busiest" else spine
            return Aim(spine, links=tuple(self._links_of(spine)))
        if rank is None:
            return self._aim_at_service(fault)
        worker = self.worker(rank)
        if hasattr(fault, "link"):
            name = worker.host.links[0].name
            return Aim(f"link {name}", worker, worker.host, worker.host.links[:1])
        where = f"rank {worker.rank} on {worker.host.name}"
        return Aim(worker.host.name if hasattr(fault, "host") else where, worker, worker.host)

    def _aim_at_service(self, fault: FaultBase) -> Aim:
        if isinstance(fault, MlflowDown):
            if self.mlflow is None:
                raise FaultError("there is no MLflow server in this scenario")
            return Aim(f"MLflow on {self.mlflow.host.name}", None, self.mlflow.host)
        head = self.lab.hosts[self.lab.file.head]
        return Aim(f"Ray's head on {head.name}", None, head)

    def worker(self, rank: int | str) -> WorkerPlace:
        """Return the worker that is `rank` in the newest generation; see `faults.Rank`.

        Raises: FaultError when there is none.
        """
        ranks, info = self._newest_generation()
        if rank == "away":
            away = [r for r, w in enumerate(ranks) if info[w]["host"] != self.lab.file.head]
            rank = away[0] if away else len(ranks)
        if not isinstance(rank, int) or rank >= len(ranks):
            raise FaultError(f"there is no such rank ({rank}): {len(ranks)} ranks run")
        worker_id = ranks[rank]
        host = self.lab.hosts[info[worker_id]["host"]]
        inner_pid = int(info[worker_id]["pid"])
        pid = host.outer_pid(inner_pid)
        if pid is None:
            raise FaultError(f"{worker_id} (rank {rank}, pid {inner_pid} on {host.name}) is gone")
        return WorkerPlace(rank, worker_id, host, pid, inner_pid)

    def _newest_generation(self) -> tuple[list[str], dict[str, Any]]:
        """Return the worker of each rank, and what every worker said of itself."""
        if self.run_dir is None:
            raise FaultError("the run has no folder yet; choose a later moment")
        ranks: list[str] = []
        info: dict[str, Any] = {}
        for event in read_journal(self.run_dir / "journal.jsonl"):
            if event["event"] == "generation_started":
                ranks = event["ranks"]
            elif event["event"] == "worker_ready":
                info[event["worker_id"]] = event["info"]
        return ranks, info

    def _links_of(self, spine: str) -> list[Link]:
        return [link for link in self.lab.links.values() if link.b.network.name == spine]

    def _busiest_spine(self) -> str:
        """Return the spine whose links carry most for a moment."""
        names = {link.b.network.name for link in self.lab.links.values() if "-" in link.name}
        before = {name: self._num_bytes(name) for name in names}
        time.sleep(_BUSY_S)
        return max(sorted(names), key=lambda name: self._num_bytes(name) - before[name])

    def _num_bytes(self, spine: str) -> int:
        counts = [link.num_bytes() for link in self._links_of(spine)]
        return sum(count.a_to_b + count.b_to_a for count in counts)


def wait_for(condition: Callable[[], bool], timeout_s: float) -> float | None:
    """Wait until a condition holds; return the seconds that it took, None if it never did."""
    start_s = time.monotonic()
    while not condition():
        if time.monotonic() - start_s > timeout_s:
            return None
        time.sleep(0.002)
    return time.monotonic() - start_s


def death_proof(what: str, pid: int, start: str | None) -> Proof:
    """Prove that a process, known by its start time, is gone."""
    took_s = wait_for(lambda: start is None or process_start(pid) != start, _DEATH_TIMEOUT_S)
    gone = f"gone after {took_s * 1e3:.0f} ms" if took_s is not None else "still there"
    return Proof(f"{what}, pid {pid} outside", gone, took_s is not None)


def send(pid: int, number: int) -> None:
    """Send a signal to a process, never to a later one with its pid.

    Raises: FaultError when it is gone.
    """
    import signal

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise FaultError(f"process {pid} is gone") from error
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError as error:
        raise FaultError(f"process {pid} is gone") from error
    finally:
        os.close(descriptor)


def state_of(pid: int) -> str:
    """Return the kernel's letter for what a process does (R, S, D, T, Z), empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]
