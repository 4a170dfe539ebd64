"""Save and load the state of a run while it trains, so that no acknowledged step is ever lost.

`Checkpointer.save` copies what this rank has to write into buffers and returns; one background
thread hashes, writes, syncs and commits. `load_newest` brings back the newest step that verifies,
onto any number of ranks.

What a save costs the training: the copy, and then the processor time of the background thread.
DCP's own driver (`dcp.save`) gathers and scatters pickled plans and metadata with every save; here
the plan is made once per Checkpointer, with one exchange, and a save has two small exchanges: what
each rank has written, and what became of it. Driving planner and storage ourselves is sound as
long as the layout of the state does not change, which `save` checks.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.planner import SavePlan

from gangline.comm.collectives import exchange_json
from gangline.comm.errors import CommError
from gangline.comm.mesh import Mesh
from gangline.trainers.checkpoint_coordinator import CheckpointEvent, Coordinator, Job
from gangline.trainers.checkpoint_load import load, load_newest
from gangline.trainers.checkpoint_plan import (
    Shard,
    ShardSavePlanner,
    State,
    plan_from_json,
    plan_to_json,
)
from gangline.trainers.checkpoint_storage import MAX_FILE_BYTES, ROOM_FACTOR, SafetensorsWriter
from gangline.trainers.commit import (
    CheckpointError,
    CheckpointInfo,
    CommitFence,
    CorruptCheckpointError,
    StaleGenerationError,
    Verification,
    list_checkpoints,
    newest,
    verify,
)

__all__ = [
    "CheckpointError",
    "CheckpointEvent",
    "CheckpointInfo",
    "Checkpointer",
    "CorruptCheckpointError",
    "Shard",
    "StaleGenerationError",
    "State",
    "Verification",
    "list_checkpoints",
    "load",
    "load_newest",
    "newest",
    "verify",
]

# name, dtype, local shape, offset, global shape
_LayoutRow = tuple[str, torch.dtype, torch.Size, tuple[int, ...], tuple[int, ...]]


class Checkpointer:
    """Write checkpoints of one generation of a run.

    All ranks of the mesh make one, and call `save` with the same steps in the same order. Rank 0
    decides and commits. A failed save (no room, a disk error) is an event, the training goes on,
    and the next save tries again; nothing older is removed to make room. The thread talks over the
    mesh's "checkpoint" axis alone; a rank whose disk is slower than that of the others by more than
    the time-out of that axis is taken for lost.

    Raises: StaleGenerationError where a newer generation has been admitted; WriterLockedError
    where another process writes checkpoints here.
    """

    def __init__(
        self,
        root: Path,
        *,
        mesh: Mesh,
        keep: int,
        asynchronous: bool,
        config_digest: str,
        timeout_s: float = 600.0,  # for a save in flight, when the next one comes
        max_file_bytes: int = MAX_FILE_BYTES,
        room_factor: float = ROOM_FACTOR,  # free space asked for, as a multiple of the checkpoint
    ) -> None:
        self._root = Path(root)
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._root.mkdir(parents=True, exist_ok=True)
        self._planner = ShardSavePlanner()
        self._writer = SafetensorsWriter(
            self._root,
            fence=CommitFence(self._root),
            generation=mesh.generation,
            axes={name: axis.size for name, axis in mesh.axes.items() if name != "checkpoint"},
            config_digest=config_digest,
            max_file_bytes=max_file_bytes,
            room_factor=room_factor,
        )
        self._coordinator: Coordinator | None = None
        if mesh.rank == 0:
            self._coordinator = Coordinator(
                self._root, self._writer, generation=mesh.generation, keep=keep
            )
        self._plan: SavePlan | None = None
        self._layout: list[_LayoutRow] = []
        self._attempt, self._num_saves = "", 0
        self._broken: str | None = None
        self._in_flight: Job | None = None  # the last one given to the thread
        self._events: deque[CheckpointEvent] = deque()
        self._idle = threading.Event()
        self._idle.set()
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if asynchronous:
            self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
            self._thread.start()
        elif self._coordinator is not None:
            self._coordinator.clean()

    def save(self, step: int, state: State, extra: Mapping[str, Any]) -> None:
        """Save `state` as `step`; asynchronously it returns when `state` may be changed again.

        `extra` is JSON, small, and rank 0's counts. A save that comes while one is in flight
        waits for that one. The outcome comes from `poll`: `parts_s` has wait and stage (the
        caller's time), hash, write, fsync, exchange, commit, prune, total and cpu.

        Communicates: the local plans, once, with the first save. Raises: CommError from that
        exchange alone; ValueError for a state whose layout is not that of the first save, or an
        `extra` that is not JSON.
        """
        started_s = time.monotonic()
        copied: dict[str, Any] = json.loads(json.dumps(extra, allow_nan=False))
        self.wait()
        waited_s = time.monotonic() - started_s
        self._num_saves += 1
        if self._broken is not None:
            self._fail(step, f"checkpoints have stopped: {self._broken}", {"wait": waited_s})
            return
        self._make_plan(state)
        staging_s = time.monotonic()
        self._planner.stage(state)
        parts_s = {"wait": waited_s, "stage": time.monotonic() - staging_s}
        job = Job(step, f"{self._attempt}-{self._num_saves:06x}", copied, parts_s)
        if self._thread is None:
            self._run(job)
        else:
            self._in_flight = job
            self._idle.clear()
            self._queue.put(job)

    def poll(self) -> list[CheckpointEvent]:
        """Return the outcomes that have come in since the last call, oldest first; no wait."""
        events = []
        with suppress(IndexError):
            while True:
                events.append(self._events.popleft())
        return events

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the save in flight; False when it is not finished within `timeout_s`.

        Without one, that of the constructor counts, and after it the save is given up: an event
        says so, and no other one is begun, because the ranks can no longer be sure to be at the
        same save.
        """
        if timeout_s is not None:
            return self._idle.wait(timeout_s)
        is_idle = self._idle.wait(self._timeout_s)
        if not is_idle:
            self._give_up(self._timeout_s)
        return is_idle

    def close(self, timeout_s: float = 60.0) -> None:
        """Finish the save in flight and end the thread. Idempotent; `poll` still works after it.

        With an aborted mesh the save in flight ends as soon as the disk lets it. A disk that hangs
        cannot be interrupted: after `timeout_s` the thread is left behind, and only the fence
        stands between it and a commit.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._give_up(timeout_s)
                return
        self._broken = self._broken or "this Checkpointer is closed"
        if self._coordinator is not None:
            self._coordinator.close()

    def _give_up(self, timeout_s: float) -> None:
        if self._broken is None and self._in_flight is not None:
            self._broken = f"step {self._in_flight.step} was not saved within {timeout_s:g} s"
            reason = f"{self._broken}; it may still be, the disk does not answer"
            self._events.append(self._event("failed", self._in_flight, reason))

    def _make_plan(self, state: State) -> None:
        layout: list[_LayoutRow] = [
            (name, shard.tensor.dtype, shard.tensor.shape, shard.offset, shard.global_shape)
            for name, shard in state.items()
        ]
        if self._plan is not None:
            if layout != self._layout:
                changed = {row[0] for row in set(layout) ^ set(self._layout)} or {"the order"}
                raise ValueError(
                    f"the layout of {len(changed)} tensors has changed, such as {min(changed)!r}; "
                    "close this Checkpointer and make a new one on all ranks"
                )
            return
        self._planner.set_up_planner(state)
        mine = {
            "plan": plan_to_json(self._planner.create_local_plan()),
            "id": uuid.uuid4().hex[:12],
        }
        all_plans = exchange_json(mine, self._mesh, "world")
        self._attempt = all_plans[0]["id"]
        local_plans = [plan_from_json(other["plan"]) for other in all_plans]
        plans, _ = self._planner.create_global_plan(local_plans)
        plans = self._writer.prepare_global_plan(plans)
        self._plan = self._planner.finish_plan(plans[self._mesh.rank])
        self._layout = layout

    def _work(self) -> None:
        # At the priority of the training. Ten steps nicer, it cost the training as much (25.0
        # against 26.4 ms a save of 18 MB on two busy cores) and took four times as long.
        if self._coordinator is not None:
            self._coordinator.clean()
        while (job := self._queue.get()) is not None:
            try:
                self._run(job)
            finally:
                self._idle.set()

    def _run(self, job: Job) -> None:
        started_s, cpu_s = time.monotonic(), time.thread_time()
        try:
            event = self._save(job)
        except CommError as error:
            self._broken = f"a peer was lost ({error})"
            reason = f"{self._broken}; only rank 0 knows whether this step was committed"
            event = self._event("failed", job, reason)
        except Exception:  # noqa: BLE001 - a fault of ours in this thread must not pass in silence
            self._broken = f"a fault in the checkpoint thread: {traceback.format_exc()}"
            event = self._event("failed", job, self._broken)
            self._mesh.abort()  # the peers wait for this rank
        job.parts_s["total"] = time.monotonic() - started_s
        job.parts_s["cpu"] = time.thread_time() - cpu_s
        self._events.append(event)

    def _save(self, job: Job) -> CheckpointEvent:
        self._writer.begin_step(job.step, extra=job.extra, attempt=job.attempt)
        mine = {"step": job.step, "attempt": job.attempt, **self._write(job)}
        reports = self._exchange(job, mine)
        if self._coordinator is not None:
            outcome = self._coordinator.commit(job, reports)
            try:
                self._exchange(job, outcome)
            except CommError as error:  # what is committed stays committed
                self._broken = f"a peer was lost ({error})"
            if outcome["status"] != "failed":
                outcome["reason"] += self._coordinator.prune(job)
        else:
            outcome = self._exchange(job, {})[0]
        return self._event(
            outcome["status"], job, outcome["reason"], is_fenced=outcome.get("is_fenced", False)
        )

    def _write(self, job: Job) -> dict[str, Any]:
        assert self._plan is not None, "save makes the plan first"
        try:
            results = self._writer.write_data(self._plan, self._planner).value()
        except (CheckpointError, OSError) as error:
            return {"error": f"rank {self._mesh.rank}: {error}"}
        files = {}
        for result in results:
            written = result.storage_data
            files[written.name] = [written.record.num_bytes, written.record.sha256]
            for part, seconds in written.parts_s.items():
                job.parts_s[part] = job.parts_s.get(part, 0.0) + seconds
        return {"files": files}

    def _exchange(self, job: Job, value: dict[str, Any]) -> list[dict[str, Any]]:
        started_s = time.monotonic()
        values: list[dict[str, Any]] = exchange_json(value, self._mesh, "checkpoint")
        spent_s = time.monotonic() - started_s
        job.parts_s["exchange"] = job.parts_s.get("exchange", 0.0) + spent_s
        return values

    def _event(
        self,
        status: Literal["committed", "kept", "failed"],
        job: Job,
        reason: str,
        *,
        is_fenced: bool = False,
    ) -> CheckpointEvent:
        return CheckpointEvent(
            status=status,
            step=job.step,
            generation=self._mesh.generation,
            reason=reason.strip(),
            num_bytes=self._writer.num_bytes,
            parts_s=job.parts_s,
            path=None if status == "failed" else self._root / f"step-{job.step:08d}",
            is_fenced=is_fenced,
        )

    def _fail(self, step: int, reason: str, parts_s: dict[str, float]) -> None:
        self._events.append(self._event("failed", Job(step, "", {}, parts_s), reason))
