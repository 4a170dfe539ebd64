"""Carry the faults of a scenario out: a thread for each, which waits, strikes, takes it back.

    with injected(scenario, stage, progress) as records: ...

Every fault brings its proof: what was seen of it from outside before, while and after it lasted. A
fault that cannot be proven is a fault that did not happen, and fails the scenario.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gangline.orchestrator import faults_links, faults_processes, faults_services
from gangline.orchestrator.errors import LabError
from gangline.orchestrator.faults import FaultBase, Progress, begins_in_s, labels_of
from gangline.orchestrator.faults_stage import Aim, Begun, FaultError, Stage
from gangline.orchestrator.timeline import FaultRecord

# Steps are a few milliseconds apart in the jobs of a lab.
_LOOK_EVERY_S = 0.01

_ACTS: dict[str, Callable[[Any, Aim, Stage], Begun]] = {
    "kill_worker": faults_processes.kill_worker,
    "stop_worker": faults_processes.stop_worker,
    "hold_gil": faults_processes.hold_gil,
    "slow_compute": faults_processes.slow_compute,
    "kill_raylet": faults_processes.kill_raylet,
    "kill_head": faults_processes.kill_head,
    "kill_host": faults_processes.kill_host,
    "slow_link": faults_links.slow_link,
    "blackhole": faults_links.blackhole,
    "link_down": faults_links.link_down,
    "flapping_link": faults_links.flapping_link,
    "spine_down": faults_links.spine_down,
    "spine_black": faults_links.spine_black,
    "disk_full": faults_services.disk_full,
    "mlflow_down": faults_services.mlflow_down,
}


@contextmanager
def injected(
    faults: Sequence[FaultBase],
    stage: Stage,
    progress: Callable[[], Progress],
    *,
    leave_out: bool = False,
) -> Iterator[list[FaultRecord]]:
    """Carry out the faults while the block runs; take back at its end what still lasts.

    `progress` says how far the job is. With `leave_out` nothing is done, and the records say when
    it would have been.
    """
    stop = threading.Event()
    injections = [
        _Injection(fault, label, stage, progress, stop, leave_out=leave_out)
        for fault, label in zip(faults, labels_of(faults), strict=True)
    ]
    for injection in injections:
        injection.start()
    try:
        yield [injection.record for injection in injections]
    finally:
        stop.set()
        for injection in injections:
            injection.join()


class _Injection(threading.Thread):
    """One fault from its moment to its end."""

    def __init__(
        self,
        fault: FaultBase,
        label: str,
        stage: Stage,
        progress: Callable[[], Progress],
        stop: threading.Event,
        *,
        leave_out: bool,
    ) -> None:
        super().__init__(name=f"fault {label}", daemon=True)
        self._fault, self._stage, self._progress, self._stop_asked = fault, stage, progress, stop
        kind = str(fault.kind)  # type: ignore[attr-defined]
        lasts = "for_s" in type(fault).model_fields
        self.record = FaultRecord(label, kind, "", lasts=lasts, is_left_out=leave_out)

    def run(self) -> None:
        """Wait for the moment, strike, wait, take it back; whatever goes wrong is in the record."""
        if not self._wait_for_moment():
            return
        record, for_s = self.record, getattr(self._fault, "for_s", None)
        try:
            aim = self._stage.aim(self._fault)
            self._note_aim(aim)
            begun = Begun(time.time())
            if not record.is_left_out:
                begun = _ACTS[record.kind](self._fault, aim, self._stage)
                self._stage.note(f"{record.label}: {aim.target}")
            record.begun_at = begun.at
            record.proofs += begun.proofs
            was_asked_to_stop = self._stop_asked.wait(self._remaining_s(begun.at, for_s))
            if record.lasts and not was_asked_to_stop:
                record.ended_at = time.time()
            if begun.end is not None:
                record.proofs += begun.end()
            if record.ended_at is not None:
                self._stage.note(f"{record.label}: taken back")
        except (FaultError, LabError, OSError) as error:
            record.error = str(error)
        except Exception as error:  # noqa: BLE001 - a thread's error must not pass in silence
            record.error = f"unexpected {type(error).__name__}: {error}"

    def _note_aim(self, aim: Aim) -> None:
        record = self.record
        direction = getattr(self._fault, "direction", "both")
        record.target = aim.target + ("" if direction == "both" else f" {direction}")
        record.rank = aim.worker.rank if aim.worker else None
        record.host = aim.host.name if aim.host else None
        record.links = [link.name for link in aim.links]

    def _wait_for_moment(self) -> bool:
        while not self._stop_asked.is_set():
            wait_s = begins_in_s(self._fault, self._progress(), time.time())
            if wait_s <= 0:
                return True
            self._stop_asked.wait(_LOOK_EVERY_S if math.isinf(wait_s) else min(wait_s, 1.0))
        return False

    def _remaining_s(self, begun_at: float, for_s: float | None) -> float | None:
        if not self.record.lasts:
            return 0.0
        return None if for_s is None else max(0.0, begun_at + for_s - time.time())
