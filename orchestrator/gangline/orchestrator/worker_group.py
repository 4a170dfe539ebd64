"""The workers of one job as Ray actors in one placement group.

A *slot* is a bundle of the placement group, a place where a worker can be; a *worker* is one
process, with an id that is never used again. The group creates workers, finds the ones an earlier
controller made, ends them, and calls them all at once. Who is which rank is the controller's
business.

Workers are detached named actors, so that they outlive the controller that made them and a
restarted one can take them over; each ends by itself when no controller has called it for the
length of its lease.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group
from ray.util.placement_group import remove_placement_group as ray_remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gangline.orchestrator.worker import Program, Worker

Json = dict[str, Any]

# Calls that must answer while `watch` blocks: fence, poll, stop, and one to spare.
_MAX_CONCURRENCY = 6


class PlacementError(RuntimeError):
    """The cluster cannot give the job its workers (now)."""


@dataclass
class Member:
    """One worker process. `info` is what it said of itself when it was warm, else None."""

    worker_id: str
    slot: int
    actor: Any  # a Ray actor handle: its methods have `.remote`
    info: Json | None = None

    @property
    def host(self) -> str:
        """The node's name as the worker sees it."""
        return str(self.info["host"]) if self.info else "a node not known yet"


class WorkerGroup:
    """Slots and the workers in them. Call `create` or `attach` first."""

    def __init__(
        self,
        run_id: str,
        *,
        bundle: dict[str, float],
        num_slots: int,
        run_dir: str,
        make_program: Callable[[], Program],
        lease_s: float,
        strategy: str = "PACK",
    ) -> None:
        self._run_id = run_id  # qualifies all names: a cluster may run many jobs
        self._bundle = bundle
        self.num_slots = num_slots
        self._run_dir = run_dir
        self._make_program = make_program
        self._lease_s = lease_s
        self._strategy = strategy
        self._placement: PlacementGroup | None = None
        self.members: dict[str, Member] = {}

    def create(self, timeout_s: float) -> None:
        """Reserve all slots at once, or none.

        Raises: PlacementError, after `timeout_s`, with what was asked for and what there is.
        """
        with contextlib.suppress(ValueError):
            # An earlier controller may have been killed between making and journaling it.
            ray_remove_placement_group(get_placement_group(self._run_id))
        self._placement = placement_group(
            [self._bundle] * self.num_slots,
            strategy=self._strategy,
            name=self._run_id,
            lifetime="detached",
        )
        if not self._placement.wait(timeout_s):
            available = ray.available_resources()
            raise PlacementError(
                f"the cluster could not place {self.num_slots} workers of {self._bundle} within "
                f"{timeout_s:.0f} s; free now: "
                f"{ {k: v for k, v in available.items() if k in ('CPU', 'GPU', 'memory')} }; "
                "set workers.count, workers.spares, workers.cpus or workers.gpus to fit"
            )

    def attach(self, workers: Iterable[tuple[str, int, Json | None]]) -> list[str]:
        """Take over the workers (`worker_id`, `slot`, `info`) that an earlier controller made.

        Returns: the ids of those that no longer exist.
        """
        self._placement = get_placement_group(self._run_id)
        missing = []
        for worker_id, slot, info in workers:
            try:
                actor = ray.get_actor(self._actor_name(worker_id))
            except ValueError:
                missing.append(worker_id)
            else:
                self.members[worker_id] = Member(worker_id, slot, actor, info)
        return missing

    def spawn(self, worker_id: str, slot: int) -> Member:
        """Start a worker in a free slot; return before it is up."""
        assert self._placement is not None, "create() or attach() comes first"
        actor = (
            ray.remote(Worker)
            .options(
                name=self._actor_name(worker_id),
                lifetime="detached",
                num_cpus=self._bundle.get("CPU", 0),
                num_gpus=self._bundle.get("GPU", 0),
                memory=self._bundle.get("memory"),
                max_restarts=0,  # whether and as what a rank comes back is the policy's decision
                max_task_retries=0,
                max_concurrency=_MAX_CONCURRENCY,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement,
                    placement_group_bundle_index=slot,
                    placement_group_capture_child_tasks=False,
                ),
            )
            .remote(
                worker_id,
                self._run_dir,
                ray.util.get_node_ip_address,
                self._make_program,
                self._lease_s,
            )
        )
        self.members[worker_id] = member = Member(worker_id, slot, actor)
        return member

    def kill(self, worker_id: str) -> None:
        """End a worker's process for good and free its slot."""
        member = self.members.pop(worker_id)
        ray.kill(member.actor, no_restart=True)

    def free_slots(self) -> list[int]:
        """Return the slots without a worker whose node is alive."""
        taken = {member.slot for member in self.members.values()}
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        assert self._placement is not None, "create() or attach() comes first"
        nodes = placement_group_table(self._placement)["bundles_to_node_id"]
        return [
            slot for slot in range(self.num_slots) if slot not in taken and nodes[slot] in alive
        ]

    def _actor_name(self, worker_id: str) -> str:
        return f"{self._run_id}/{worker_id}"

    def call(
        self, worker_ids: Iterable[str], method: str, *args: Any, timeout_s: float
    ) -> dict[str, Any]:
        """Call `method(*args)` on the given workers at once; wait for all of them.

        Returns: per worker its answer, or the exception: `is_gone` tells a dead process,
        GetTimeoutError one that did not answer in time.
        """
        refs = {
            worker_id: getattr(self.members[worker_id].actor, method).remote(*args)
            for worker_id in worker_ids
        }
        return self.collect(refs, timeout_s)

    @staticmethod
    def collect(refs: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Wait for several answers together; an exception is an answer like any other."""
        deadline_s = time.monotonic() + timeout_s
        if refs:
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s)
        answers: dict[str, Any] = {}
        for worker_id, ref in refs.items():
            try:
                answers[worker_id] = ray.get(ref, timeout=max(0.0, deadline_s - time.monotonic()))
            except Exception as error:  # noqa: BLE001 - handed to the caller, who asks is_gone()
                answers[worker_id] = error
        return answers

    def close(self) -> None:
        """End all workers and give the slots back."""
        for worker_id in list(self.members):
            self.kill(worker_id)
        if self._placement is not None:
            ray_remove_placement_group(self._placement)
            self._placement = None


def is_gone(answer: Any) -> bool:
    """Whether an answer of `call` says that the worker's process is dead or cannot be reached."""
    return isinstance(answer, RayActorError)


def describe(error: BaseException) -> str:
    """Say in one line what went wrong in a worker: the original error, not Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    text = "".join(traceback.format_exception_only(cause)).strip().splitlines()
    return text[-1] if text else type(cause).__name__
