"""Who works for a job: workers that start, are warm, or are gone, with a journal entry for each.

`WorkerGroup` makes and ends actors; the roster knows which of them can be used. Ranks are not its
business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from gangline.orchestrator.run_state import RunState
from gangline.orchestrator.worker_group import WorkerGroup, describe, is_gone

Json = dict[str, Any]

_TICK_S = 0.2
_START_TIMEOUT_S = 300.0
_PREPARE_TIMEOUT_S = 24 * 3600.0
# Between two looks for free slots; doubled by each worker that could not start.
_REFILL_PAUSE_S = 5.0
_MAX_REFILL_PAUSE_S = 300.0


class StartError(RuntimeError):
    """Workers could not be started, or the job's own preparation failed."""


class Roster:
    """The workers of a run. `event(name, message, **fields)` journals, and updates `state`."""

    def __init__(self, group: WorkerGroup, state: RunState, event: Callable[..., None]) -> None:
        self.group = group
        self._state = state
        self._event = event
        self._warming: dict[str, Any] = {}
        self._next_refill_s = 0.0
        self._refill_pause_s = _REFILL_PAUSE_S

    def ready(self) -> list[str]:
        """Return the warm workers, oldest first."""
        return [w for w, member in self.group.members.items() if member.info is not None]

    @property
    def num_warming(self) -> int:
        """How many workers are starting."""
        return len(self._warming)

    def spawn(self, slot: int) -> str:
        """Start a worker in a free slot; it is not warm before `start_warming` has ended."""
        worker_id = f"w{self._state.num_workers_ever}"
        self._event(
            "worker_created", f"starting {worker_id} in slot {slot}", worker_id=worker_id, slot=slot
        )
        self.group.spawn(worker_id, slot)
        return worker_id

    def start_warming(self, worker_id: str) -> None:
        """Let a worker get ready in the background; `collect_warm` learns when it is."""
        actor = self.group.members[worker_id].actor
        self._warming[worker_id] = actor.warm.remote(self._state.shared)

    def refill(self) -> None:
        """Start a worker in every free slot; after a failed start, only now and then."""
        if time.monotonic() < self._next_refill_s:
            return
        self._next_refill_s = time.monotonic() + self._refill_pause_s
        for slot in self.group.free_slots():
            self.start_warming(self.spawn(slot))

    def attach(self) -> None:
        """Take over the workers that the journal knows of; note those that are gone."""
        known = self._state.workers
        missing = self.group.attach((w, known[w].slot, known[w].info) for w in known)
        for worker_id in missing:
            self._event("worker_ended", f"{worker_id} is gone", worker_id=worker_id)
        for worker_id, member in self.group.members.items():
            if member.info is None:
                self.start_warming(worker_id)

    def prepare(self) -> Json:
        """Let one worker prepare what all need (the tokenised data).

        Raises: StartError with the job's own error, such as a corpus that does not exist.
        """
        worker_id = next(iter(self.group.members))
        answer = self.group.call([worker_id], "prepare", timeout_s=_PREPARE_TIMEOUT_S)[worker_id]
        if isinstance(answer, BaseException):
            raise StartError(describe(answer))
        shared: Json = answer
        return shared

    def wait_warm(self, num_needed: int, on_tick: Callable[[], None]) -> None:
        """Wait until `num_needed` workers are ready, whichever they are.

        Raises: StartError when they cannot be had within 300 s.
        """
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while len(self.ready()) < num_needed:
            refusal = self.collect_warm(wait_s=_TICK_S)
            if refusal is not None:
                raise StartError(refusal)
            on_tick()
            num_ready = len(self.ready())
            if num_ready < num_needed and not self._warming:
                raise StartError(f"only {num_ready} of {num_needed} workers could be started")
            if time.monotonic() > deadline_s:
                raise StartError(
                    f"only {num_ready} of {num_needed} workers were ready after "
                    f"{_START_TIMEOUT_S:.0f} s; see logs/"
                )

    def collect_warm(self, wait_s: float = 0.0) -> str | None:
        """Take in the workers that have become warm, waiting at most `wait_s` for one.

        Returns: what a worker said that refused to start (a model that does not fit, say), which
        others would say, too; None for one that just died.
        """
        if not self._warming:
            return None
        done, _ = ray.wait(list(self._warming.values()), num_returns=1, timeout=wait_s)
        finished = {w: ref for w, ref in self._warming.items() if ref in done}
        refusal = None
        for worker_id, answer in self.group.collect(finished, timeout_s=1.0).items():
            del self._warming[worker_id]
            if isinstance(answer, BaseException):
                self.drop(worker_id, f"{worker_id} could not start: {describe(answer)}")
                self._refill_pause_s = min(2 * self._refill_pause_s, _MAX_REFILL_PAUSE_S)
                self._next_refill_s = time.monotonic() + self._refill_pause_s
                refusal = refusal if is_gone(answer) else describe(answer)
                continue
            self._refill_pause_s = _REFILL_PAUSE_S
            self.group.members[worker_id].info = answer
            self._event(
                "worker_ready",
                f"{worker_id} is ready: pid {answer['pid']} on {answer['host']}",
                worker_id=worker_id,
                info=answer,
            )
        return refusal

    def drop(self, worker_id: str, message: str) -> None:
        """End a worker for good."""
        self._warming.pop(worker_id, None)
        self._next_refill_s = 0.0  # its slot is free now
        self.group.kill(worker_id)
        self._event("worker_ended", message, worker_id=worker_id)
