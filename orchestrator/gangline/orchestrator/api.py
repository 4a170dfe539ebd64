"""Gangline's verbs from Python; the command line is thin over this file.

    from gangline.orchestrator import api

    info = api.run("moe_text.yaml", overrides=["training.steps=20"])
    info = api.submit("moe_text.yaml", address="http://head:8265")
    for record in api.follow(info.run_id):
        ...
    info = api.wait(info.run_id).check()

A job is named by its run id, its name (the newest run of it), a beginning of its run id, or
`@last`. `runs` is the folder with the job table, and where run folders are made unless the job
file says otherwise. Errors are `GanglineError`s (errors.py); a job file's faults are
`JobFileError`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gangline.orchestrator.errors import GanglineError, TimedOutError
from gangline.orchestrator.history import History
from gangline.orchestrator.job_stream import detailed_info_of, stream, wait_for_end
from gangline.orchestrator.launch import (
    Stop,
    Watcher,
    load,
    resubmit,
    resume_run,
    start_run,
    start_submission,
)
from gangline.orchestrator.reconcile import UNKNOWN, JobInfo, reconcile
from gangline.orchestrator.runs import request_cancel, resolve

if TYPE_CHECKING:
    from gangline.orchestrator.follow import Record
    from gangline.orchestrator.job import Job
    from gangline.orchestrator.jobs_rest import JobsRest
    from gangline.orchestrator.plan import Plan

__all__ = [
    "JobInfo",
    "Stop",
    "Watcher",
    "cancel",
    "events",
    "follow",
    "logs",
    "ls",
    "plan",
    "resume",
    "run",
    "schema",
    "show",
    "submit",
    "to_json",
    "wait",
]

DEFAULT_RUNS = Path("runs")

JobFile = Path | str
RunsFolder = Path | str | None


def plan(
    file: JobFile,
    *,
    overrides: Sequence[str] = (),
    name: str | None = None,
    address: str | None = None,
    token_file: JobFile | None = None,
) -> Plan:
    """Say what `run` or `submit` would do with a job file; nothing is written anywhere.

    With the `address` of a cluster's dashboard also whether it fits that.

    Raises: JobFileError with every fault of the file; PlanError when it can never work.
    """
    from gangline.orchestrator.plan import plan as plan_of

    job = load(Path(file), overrides, check_paths=address is None, name=name)
    if address is None:
        return plan_of(job)
    from gangline.orchestrator.plan_fit import cluster_of

    rest = _cluster(address, str(token_file) if token_file else job.cluster.token_file)
    return plan_of(job, cluster=cluster_of(rest.node_resources()))


def run(
    file: JobFile,
    *,
    overrides: Sequence[str] = (),
    name: str | None = None,
    address: str | None = None,
    runs: RunsFolder = None,
    watcher: Watcher | None = None,
    stop: Stop | None = None,
) -> JobInfo:
    """Run a job in this process and return how it ended.

    It gets a private Ray, or the cluster at `address` or `cluster.address` (HOST:PORT).

    Raises: JobFileError, PlanError, ClusterError, InfeasibleError. That the job fails is no
    error here; `.check()` on the result makes it one.
    """
    job = load(Path(file), overrides, name=name, cluster__address=address)
    with closing(_history(runs)) as history:
        return start_run(
            history, job, _root(job, runs), watcher or Watcher(), stop or Stop.unasked()
        )


def submit(
    file: JobFile,
    *,
    overrides: Sequence[str] = (),
    name: str | None = None,
    address: str | None = None,
    token_file: JobFile | None = None,
    python: str | None = None,
    runs: RunsFolder = None,
    watcher: Watcher | None = None,
) -> JobInfo:
    """Send a job to a cluster and return at once.

    `address` is the dashboard's, http://HOST:8265; without it `cluster.address` of the file, then
    RAY_API_SERVER_ADDRESS, then this machine's. `python` is the cluster's interpreter, found out
    where it is not given.

    Raises: JobFileError, PlanError, UnreachableError, AuthError, InfeasibleError.
    """
    absolute = str(Path(token_file).expanduser().absolute()) if token_file else None
    job = load(
        Path(file),
        overrides,
        check_paths=False,
        name=name,
        cluster__address=address,
        cluster__token_file=absolute,
    )
    rest = _cluster(job.cluster.address, job.cluster.token_file)
    with closing(_history(runs)) as history:
        return start_submission(history, job, _root(job, runs), rest, python, watcher or Watcher())


def ls(
    *, runs: RunsFolder = None, states: Collection[str] = (), limit: int | None = None
) -> list[JobInfo]:
    """Return the jobs of this runs folder, newest first, as they are now.

    `limit` looks at the newest few only; `states` keeps those in one of these states.
    """
    with closing(_history(runs)) as history:
        infos = reconcile(history, history.rows()[:limit])
    return [info for info in infos if not states or info.state in states]


def show(job: str, *, runs: RunsFolder = None) -> JobInfo:
    """Return one job as it is now.

    Raises: NotFoundError.
    """
    with closing(_history(runs)) as history:
        return detailed_info_of(history, resolve(job, history.rows()).run_id)


def follow(
    job: str,
    *,
    runs: RunsFolder = None,
    types: Collection[str] = ("event", "progress", "log"),
    ranks: Collection[int] | None = None,
    until_end: bool = True,
) -> Iterator[Record]:
    """Yield the records of a job (follow.py) from its beginning.

    With `until_end` it waits for more until the job has ended, and the last progress tells its
    final state; without, it yields what is there.

    Raises: NotFoundError; ClusterError when the job's cluster is out of reach for a minute.
    """
    with closing(_history(runs)) as history:
        run_id = resolve(job, history.rows()).run_id
        yield from stream(history, run_id, types=types, ranks=ranks, until_end=until_end)


def logs(
    job: str,
    *,
    runs: RunsFolder = None,
    ranks: Collection[int] | None = None,
    until_end: bool = False,
) -> Iterator[Record]:
    """Yield the log lines of a job's ranks; see `follow`."""
    return follow(job, runs=runs, types=("log",), ranks=ranks, until_end=until_end)


def events(job: str, *, runs: RunsFolder = None, until_end: bool = False) -> Iterator[Record]:
    """Yield the events of a job's journal; see `follow`."""
    return follow(job, runs=runs, types=("event",), until_end=until_end)


def cancel(
    job: str, *, runs: RunsFolder = None, force: bool = False, grace_s: float = 0.0
) -> JobInfo:
    """Ask a job to end: at its next safe point, or at once with `force`.

    With `grace_s` it waits so long for the end and then forces it. A job that has ended is left
    as it is.

    Raises: NotFoundError; ClusterError when its cluster cannot be asked.
    """
    info = show(job, runs=runs)
    if info.is_terminal:
        return info
    _request_end(info, force=force)
    if grace_s > 0:
        try:
            return wait(info.run_id, runs=runs, timeout_s=grace_s)
        except TimedOutError:
            _request_end(info, force=True)
    return show(info.run_id, runs=runs)


def resume(
    job: str,
    *,
    overrides: Sequence[str] = (),
    runs: RunsFolder = None,
    watcher: Watcher | None = None,
    stop: Stop | None = None,
) -> JobInfo:
    """Go on with a job that ended from its newest committed step, in the same run folder.

    A `run` goes on in this process until it ends; a submitted job is sent again, and this returns.

    Raises: NotFoundError; GanglineError while the job still runs; and what `run` or `submit` do.
    """
    info = show(job, runs=runs)
    is_lost = info.mode == "submit" and info.state == UNKNOWN
    if not info.is_terminal and not is_lost:
        raise GanglineError(
            f"{info.run_id} is {info.state}, so there is nothing to resume; "
            f"`gangline cancel {info.run_id}` ends it first"
        )
    watcher = watcher or Watcher()
    with closing(_history(runs)) as history:
        row = history.get(info.run_id)
        if row.mode == "submit":
            rest = _cluster(row.address, row.token_file)
            return resubmit(history, row, overrides, rest, watcher)
        return resume_run(history, row, overrides, watcher, stop or Stop.unasked())


def wait(job: str, *, runs: RunsFolder = None, timeout_s: float | None = None) -> JobInfo:
    """Wait until a job has ended and return how.

    Raises: NotFoundError; TimedOutError when it goes on for longer than `timeout_s`;
    ClusterError when its cluster is out of reach for a minute.
    """
    with closing(_history(runs)) as history:
        return wait_for_end(history, resolve(job, history.rows()).run_id, timeout_s)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of job files, for editors."""
    from gangline.orchestrator.job import job_schema

    return job_schema()


def to_json(info: JobInfo) -> dict[str, Any]:
    """Return a job as JSON values."""
    return asdict(info)


def _history(runs: RunsFolder) -> History:
    return History(Path(runs) if runs is not None else DEFAULT_RUNS)


def _root(job: Job, runs: RunsFolder) -> Path:
    """Return where the run folder goes: `runs` where it is given, else the job's storage.root."""
    return Path(runs if runs is not None else job.storage.root)


def _cluster(address: str | None, token_file: str | None) -> JobsRest:
    from gangline.orchestrator.jobs_rest import JobsRest, find_address, find_token

    return JobsRest(find_address(address), find_token(token_file))


def _request_end(info: JobInfo, *, force: bool) -> None:
    # A driver looks for this file wherever it runs; where the folder is not here, only Ray's stop
    # (SIGTERM, and SIGKILL after the job's grace) reaches it.
    run_dir = Path(info.run_dir)
    if run_dir.is_dir():
        request_cancel(run_dir, force=force)
    elif info.mode == "run":
        raise GanglineError(
            f"the folder {run_dir} of {info.run_id} is not here; cancel it on {info.host}, or "
            "where that folder can be seen"
        )
    if info.mode == "submit":
        _cluster(info.address, info.token_file).stop(info.submission_id or "")
