"""Drive one job: connect to Ray, start its controller, follow it, end it.

The driver is a process of its own, in both ways to start a job. `gangline run` starts it with
`run_job` and follows the run folder; whatever Ray prints goes to `logs/driver.log`, and a caller
that has imported ray already is not in the way. On a cluster it is the entry point of the
submitted job and prints the records of the run as NDJSON, which is what `gangline logs` and
`gangline events` read back through the cluster's job API.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gangline.orchestrator.cluster import connect
from gangline.orchestrator.errors import (
    ClusterError,
    ExitCode,
    GanglineError,
    InfeasibleError,
)
from gangline.orchestrator.follow import RunFollower
from gangline.orchestrator.job import Job, dump_job, load_job
from gangline.orchestrator.journal import read_status, write_status
from gangline.orchestrator.plan_fit import check_fits
from gangline.orchestrator.run_spec import RunSpec, spec_of
from gangline.orchestrator.submission import take_environment

Json = dict[str, Any]
OnRecord = Callable[[Json], None]

_TICK_S = 0.2
_MAX_TAIL_BYTES = 16 * 2**10
_HEARTBEAT_EVERY_S = 2.0
_NAMESPACE = "gangline"
_STATE_EXIT_CODES = {
    "SUCCEEDED": ExitCode.OK,
    "FAILED": ExitCode.JOB_FAILED,
    "CANCELLED": ExitCode.JOB_CANCELLED,
}
_PR_SET_PDEATHSIG = 1


def run_job(
    *,
    run_dir: Path,
    address: str | None,
    on_record: OnRecord | None,
    interrupted: threading.Event,
    forced: threading.Event | None = None,
) -> str:
    """Run the job of a run folder (`job.yaml`) to its end; return its final state.

    `address` None starts a private Ray for this job alone. `on_record` gets every event, status
    and log line as it appears. Setting `interrupted` cancels at the next safe point, `forced` at
    once; so does the file `control/cancel` in the run folder.

    Raises: ClusterError when the cluster cannot be used, InfeasibleError when it is too small,
    GanglineError when the driver itself failed.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    follower = RunFollower(run_dir, from_start=not (run_dir / "journal.jsonl").exists())
    command = [sys.executable, "-m", __name__, "--job", str(run_dir / "job.yaml")]
    command += ["--run-dir", str(run_dir), "--address", address or "private"]
    with open(run_dir / "logs" / "driver.log", "ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            [*command, "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to pass on
        )
    try:
        while process.poll() is None:
            if interrupted.is_set():
                process.send_signal(signal.SIGTERM)
                interrupted.clear()
            if forced is not None and forced.is_set():
                _request_cancel(run_dir, force=True)
            _hand_over(follower, on_record)
            time.sleep(_TICK_S)
        _hand_over(follower, on_record)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return _final_state(process.returncode, run_dir, log_start)


def _hand_over(follower: RunFollower, on_record: OnRecord | None) -> None:
    if on_record is not None:
        for record in follower.poll():
            on_record(record)


def _request_cancel(run_dir: Path, *, force: bool) -> None:
    path = run_dir / "control" / "cancel"
    path.parent.mkdir(exist_ok=True)
    path.write_text("force" if force else "")


def _final_state(exit_code: int, run_dir: Path, log_start: int) -> str:
    for state, code in _STATE_EXIT_CODES.items():
        if exit_code == code:
            return state
    status = read_status(run_dir / "status.json") or {}
    if _lost_the_head(run_dir, log_start):
        raise ClusterError(
            "the head of the Ray cluster (its GCS) was lost, and the job with it; when there is a "
            f"cluster again, `gangline resume {run_dir.name}` goes on from the newest checkpoint"
        )
    reason = status.get("reason") or f"the driver ended with exit code {exit_code}"
    message = f"{reason} (see {run_dir / 'logs' / 'driver.log'})"
    if exit_code == ExitCode.CLUSTER:
        raise ClusterError(message)
    if exit_code == ExitCode.INFEASIBLE:
        raise InfeasibleError(message)
    raise GanglineError(message)


def _lost_the_head(run_dir: Path, log_start: int) -> bool:
    """Whether Ray ended this driver for want of a head: it says so in the log alone (2.60)."""
    with open(run_dir / "logs" / "driver.log", "rb") as log:
        log.seek(max(log_start, log.seek(0, os.SEEK_END) - _MAX_TAIL_BYTES))
        return b"Failed to connect to GCS" in log.read()


def drive(
    job: Job,
    *,
    run_dir: Path,
    address: str | None,
    on_record: OnRecord | None,
    interrupted: threading.Event,
) -> str:
    """Do in this process what `run_job` does in one of its own. For the main thread only."""
    num_slots = job.workers.count + job.workers.spares
    with connect(
        address,
        namespace=_NAMESPACE,
        min_cpus=num_slots * job.workers.cpus,
        token_file=job.cluster.token_file,
    ) as resources:
        _listen_to_signals(interrupted)  # again: ray.init has put its own handler in the way
        check_fits(job.workers, resources)
        return drive_connected(job, run_dir=run_dir, on_record=on_record, interrupted=interrupted)


def drive_connected(
    job: Job,
    *,
    run_dir: Path,
    on_record: OnRecord | None = None,
    interrupted: threading.Event | None = None,
) -> str:
    """Drive a job on the Ray to which this process is connected; return its final state."""
    cancel = _CancelWatch(run_dir, interrupted or threading.Event())
    return str(_drive(spec_of(job, run_dir), cancel, on_record)["state"])


class _CancelWatch:
    """Where a wish to cancel can come from: this process's signals, or a file in the run folder."""

    def __init__(self, run_dir: Path, interrupted: threading.Event) -> None:
        self._file = run_dir / "control" / "cancel"
        self._interrupted = interrupted
        self._file.unlink(missing_ok=True)  # of an earlier session

    def wish(self) -> tuple[str, bool] | None:
        """Return (reason, force), or None while nobody wants the job to end."""
        if self._file.exists():
            return "cancelled by `gangline cancel`", "force" in self._file.read_text()
        if self._interrupted.is_set():
            return "interrupted", False
        return None


def _drive(spec: RunSpec, cancel: _CancelWatch, on_record: OnRecord | None) -> Json:
    # Only now: Ray reads its settings when it is imported, and `connect` has set them.
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from gangline.orchestrator.controller import Controller
    from gangline.orchestrator.worker_group import describe

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    controller: Any = (
        ray.remote(Controller)
        .options(
            name=f"{spec.run_id}/controller",
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=4,
            scheduling_strategy=here,
        )
        .remote(spec)
    )
    follower = RunFollower(spec.run_dir, from_start=False)
    run_ref = controller.run.remote()
    sent: tuple[str, bool] | None = None
    next_heartbeat_s = 0.0
    try:
        while True:
            done, _ = ray.wait([run_ref], timeout=_TICK_S)
            if on_record is not None:
                for record in follower.poll():
                    on_record(record)
            if done:
                try:
                    final: Json = ray.get(run_ref)
                except RayError as error:
                    raise GanglineError(f"the controller failed: {describe(error)}") from error
                return final
            if time.monotonic() >= next_heartbeat_s:
                next_heartbeat_s = time.monotonic() + _HEARTBEAT_EVERY_S
                controller.heartbeat.remote()
            wish = cancel.wish()
            if wish is not None and wish != sent:
                controller.cancel.remote(*wish)
                sent = wish
    finally:
        ray.kill(controller)


def main(arguments: list[str] | None = None) -> int:
    """Run the job of a run folder; print its records as NDJSON; return the exit code."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--address", default="auto", help="'private' starts a Ray of its own")
    parser.add_argument("--parent", type=int, help="end when this process does")
    options = parser.parse_args(arguments)
    interrupted = threading.Event()
    _listen_to_signals(interrupted)
    if options.parent is not None:
        _end_with_parent(options.parent, interrupted)
    take_environment(options.job)
    try:
        job = load_job(options.job)
        make_run_folder(options.run_dir, job)
        state = drive(
            job,
            run_dir=options.run_dir,
            address=None if options.address == "private" else options.address,
            on_record=None if options.parent is not None else _print_record,
            interrupted=interrupted,
        )
    except GanglineError as error:
        _print_record({"time": time.time(), "type": "error", "message": str(error)})
        _write_failure(options.run_dir, str(error))
        return int(error.exit_code)
    return int(_STATE_EXIT_CODES[state])


def _listen_to_signals(interrupted: threading.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: interrupted.set())


def _end_with_parent(parent: int, interrupted: threading.Event) -> None:
    """Cancel the job when the process that wanted it is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        interrupted.set()  # it was gone before the kernel knew that we care


def make_run_folder(run_dir: Path, job: Job) -> None:
    """Make what is missing of the run folder, and leave in it the job as it runs now.

    A submitted job's folder is made here, on the cluster, and a resume may change the job.
    """
    for name in ("logs", "control", "artifacts"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    draft = run_dir / ".job.yaml"
    draft.write_text(dump_job(job))
    draft.replace(run_dir / "job.yaml")


def _write_failure(run_dir: Path, reason: str) -> None:
    """Leave the reason where the run's status is looked for; no controller lived to write it."""
    status = {"run_id": run_dir.name, "state": "FAILED", "reason": reason, "since": time.time()}
    write_status(run_dir / "status.json", status | {"updated_at": time.time()})


def _print_record(record: Json) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main())
