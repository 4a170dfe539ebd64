"""The records of one job until it ends, wherever it runs; and waiting for that end.

The records come from the run folder where it can be seen, else through the cluster's job API. The
state never comes from them: it is asked for (reconcile.py), because a log that stops tells nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

from gangline.orchestrator.errors import ClusterError, NotFoundError, TimedOutError
from gangline.orchestrator.follow import POLL_S, Record, RunFollower, TextFollower
from gangline.orchestrator.history import History
from gangline.orchestrator.reconcile import UNKNOWN, JobInfo, reconcile, with_status

# How long a cluster may be out of reach before we give up on it.
CONTACT_TIMEOUT_S = 60.0
_STATE_EVERY_S = 1.0


class Follower(Protocol):
    """What both ways of following have in common."""

    def poll(self) -> list[Record]: ...
    def finish(self) -> list[Record]: ...
    def close(self) -> None: ...


class Contact:
    """Notice that a cluster has been out of reach for too long."""

    def __init__(self) -> None:
        self._lost_since_s: float | None = None

    def note(self, problem: str | None) -> None:
        """Take in the newest attempt: None when it worked.

        Raises: ClusterError when none has worked for a minute.
        """
        now_s = time.monotonic()
        if problem is None:
            self._lost_since_s = None
        elif self._lost_since_s is None:
            self._lost_since_s = now_s
        elif now_s - self._lost_since_s > CONTACT_TIMEOUT_S:
            raise ClusterError(problem)


def info_of(history: History, run_id: str) -> JobInfo:
    """Return one job as it is now."""
    return reconcile(history, [history.get(run_id)])[0]


def detailed_info_of(history: History, run_id: str) -> JobInfo:
    """Return one job as it is now; where its folder is not here, with what its driver has printed.

    That costs a transfer of all it has printed, so it is not done for lists.
    """
    info = info_of(history, run_id)
    if info.mode == "run" or info.state == UNKNOWN or info.generation is not None:
        return info
    told = _SubmittedFollower(info, ("progress",), None).finish()
    if not told:
        return info
    return with_status(info, told[-1])


def stream(
    history: History,
    run_id: str,
    *,
    types: Collection[str],
    ranks: Collection[int] | None,
    until_end: bool,
) -> Iterator[Record]:
    """Yield the records of a job from its beginning; with `until_end` wait for more until it ends.

    Where progress is wanted, a state that no record has told (waiting in Ray's queue, failed
    before the driver started, a driver that was killed) is yielded as a record of its own.

    Raises: ClusterError when its cluster is out of reach for a minute, or at once when records
    can only be had from there and it is not to be waited for.
    """
    info = info_of(history, run_id)
    follower: Follower = _follower(info, types, ranks)
    contact = Contact()
    told_state = ""
    next_look_s = 0.0
    try:
        if not until_end:
            yield from follower.finish()
            return
        while True:
            if time.monotonic() >= next_look_s:
                info = info_of(history, run_id)
                next_look_s = time.monotonic() + _STATE_EVERY_S
                contact.note(info.reason if info.state == UNKNOWN else None)
            ended = info.is_terminal
            try:
                records = follower.finish() if ended else follower.poll()
            except (ClusterError, NotFoundError) as error:
                contact.note(str(error))
                records = []
            for record in records:
                if record["type"] == "progress":
                    told_state = str(record.get("state"))
                yield record
            if "progress" in types and info.state != told_state and (ended or not told_state):
                told_state = info.state
                yield _progress_of(info)
            if ended:
                return
            if not records:
                time.sleep(POLL_S)
    finally:
        follower.close()


def wait_for_end(history: History, run_id: str, timeout_s: float | None) -> JobInfo:
    """Wait until a job has ended.

    Raises: TimedOutError; ClusterError when its cluster is out of reach for a minute.
    """
    start_s = time.monotonic()
    contact = Contact()
    while True:
        info = info_of(history, run_id)
        if info.is_terminal:
            return info
        contact.note(info.reason if info.state == UNKNOWN else None)
        left_s = float("inf") if timeout_s is None else start_s + timeout_s - time.monotonic()
        if left_s <= 0:
            raise TimedOutError(
                f"{run_id} is still {info.state} after {timeout_s:g} s and goes on; follow it "
                f"with `gangline logs -f {run_id}`"
            )
        time.sleep(min(left_s, _STATE_EVERY_S if info.mode == "submit" else POLL_S))


def _follower(info: JobInfo, types: Collection[str], ranks: Collection[int] | None) -> Follower:
    run_dir = Path(info.run_dir)
    if info.mode == "run":
        return RunFollower(run_dir, types=types, ranks=ranks)
    return _SubmittedFollower(info, types, ranks)


class _SubmittedFollower:
    """Follow a submitted job in its run folder if that shows up here, else through its cluster."""

    def __init__(
        self, info: JobInfo, types: Collection[str], ranks: Collection[int] | None
    ) -> None:
        self._info = info
        self._folder = RunFollower(Path(info.run_dir), types=types, ranks=ranks)
        self._text = TextFollower(self._fetch, types=types, ranks=ranks)
        self._chosen: Follower | None = None

    def poll(self) -> list[Record]:
        return self._choose().poll()

    def finish(self) -> list[Record]:
        return self._choose().finish()

    def close(self) -> None:
        self._folder.close()

    def _choose(self) -> Follower:
        if self._chosen is None:
            # One source only, or records would come twice. The driver prints a record after it
            # has written it, so a folder that can be seen here is seen in time.
            if self._text.num_records:
                self._chosen = self._text
            elif (Path(self._info.run_dir) / "journal.jsonl").exists():
                self._chosen = self._folder
        return self._chosen or self._text

    def _fetch(self) -> str:
        from gangline.orchestrator.jobs_rest import JobsRest, find_token

        info = self._info
        assert info.address is not None, "a submitted job has an address"
        assert info.submission_id is not None, "a submitted job has a submission id"
        return JobsRest(info.address, find_token(info.token_file)).logs(info.submission_id)


def _progress_of(info: JobInfo) -> Record:
    return {
        "type": "progress",
        "time": time.time(),
        "run_id": info.run_id,
        "name": info.name,
        "kind": info.kind,
        "state": info.state,
        "reason": info.reason,
        "step": info.step,
        "num_steps": info.num_steps,
        "loss": info.loss,
        "committed_step": info.committed_step,
        "workers": info.workers,
    }
