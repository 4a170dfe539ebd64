"""Begin a generation: fence the one before it, meet, start every rank.

The order is what keeps a stale rank harmless. First the fence is raised on disk, from where on no
older generation can commit a checkpoint; then every worker that lives ends its old run and refuses
it from now on; only then does a new store open, and the ranks meet under the new number.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from gangline.orchestrator.policy import Cause, Loss
from gangline.orchestrator.worker import Assignment
from gangline.orchestrator.worker_group import WorkerGroup, describe, is_gone

if TYPE_CHECKING:
    from gangline.orchestrator.run_spec import RunSpec

# How long a worker may take to leave its old run: a survivor notices its lost peer in
# milliseconds, and one that cannot leave is ended and replaced.
_FENCE_TIMEOUT_S = 5.0
_CALL_TIMEOUT_S = 20.0


class FormationError(Exception):
    """Some workers failed before they were started; `losses` says which."""

    def __init__(self, losses: tuple[Loss, ...]) -> None:
        super().__init__("; ".join(loss.sentence() for loss in losses))
        self.losses = losses


def form_generation(
    group: WorkerGroup, spec: RunSpec, generation: int, ranks: list[str], ready: list[str]
) -> None:
    """Start `ranks[r]` as rank r of `generation`; the other `ready` workers are fenced only.

    Raises: FormationError when a worker is lost, or does not leave its old run in time.
    """
    spec.fence(generation)
    answers = group.call(
        ready,
        "fence",
        generation,
        _FENCE_TIMEOUT_S,
        timeout_s=_FENCE_TIMEOUT_S + _CALL_TIMEOUT_S,
    )
    stuck = {
        w: TimeoutError(f"did not leave its old run within {_FENCE_TIMEOUT_S:.0f} s")
        for w, answer in answers.items()
        if isinstance(answer, dict) and not answer["idle"]
    }
    _raise_lost(group, ranks, answers | stuck)
    port = group.call(ranks[:1], "open_store", len(ranks), timeout_s=_CALL_TIMEOUT_S)
    _raise_lost(group, ranks, port)
    info = group.members[ranks[0]].info
    assert info is not None, "only warm workers become ranks"
    refs = {
        worker_id: group.members[worker_id].actor.start.remote(
            Assignment(generation, rank, len(ranks), info["ip"], port[ranks[0]])
        )
        for rank, worker_id in enumerate(ranks)
    }
    _raise_lost(group, ranks, group.collect(refs, _CALL_TIMEOUT_S))


def _raise_lost(group: WorkerGroup, ranks: list[str], answers: dict[str, Any]) -> None:
    losses = tuple(
        Loss(
            rank=ranks.index(worker_id) if worker_id in ranks else -1,
            worker_id=worker_id,
            node=group.members[worker_id].host,
            cause=Cause.KILLED if is_gone(answer) else Cause.UNRESPONSIVE,
            detail=describe(answer),
            step=None,
            time_s=time.time(),
        )
        for worker_id, answer in answers.items()
        if isinstance(answer, BaseException)
    )
    if losses:
        raise FormationError(losses)
