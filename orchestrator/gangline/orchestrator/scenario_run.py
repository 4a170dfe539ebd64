"""Run a scenario: lab up, job, faults, judge, timeline, lab down.

    run_scenario(load_scenario(path), out=folder) -> Timeline

The job runs through `gangline run` on the lab's first host, as a user would run it, against the
lab's Ray cluster. Whatever happens, the lab is taken down.
"""

from __future__ import annotations

import dataclasses
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gangline.orchestrator.errors import LabError
from gangline.orchestrator.faults import Progress
from gangline.orchestrator.faults_hook import FOLDER
from gangline.orchestrator.faults_inject import injected
from gangline.orchestrator.faults_stage import Stage
from gangline.orchestrator.job import Job, dump_job
from gangline.orchestrator.lab import Lab
from gangline.orchestrator.lab_host import Host
from gangline.orchestrator.scenario import Scenario
from gangline.orchestrator.scenario_command import LabCommand
from gangline.orchestrator.scenario_judge import judge
from gangline.orchestrator.scenario_mlflow import HealthWatch, MlflowServer, stored_steps
from gangline.orchestrator.scenario_record import (
    LinkWatch,
    RunReader,
    count_samples,
    end_of,
    wait_until,
)
from gangline.orchestrator.timeline import Timeline, save

Json = dict[str, Any]
Note = Callable[[str], None]

# Between the end of the command and the end of the last process that it started.
_LEFTOVER_TIMEOUT_S = 12.0
_SHOW_TIMEOUT_S = 30.0
# What a job may leave in a host: its workers and controller, as Ray names their processes, and
# whatever runs a module of ours.
_OURS = (b"ray::Worker", b"ray::Controller", b"gangline.orchestrator", b"gangline.monitoring")


def run_scenario(
    scenario: Scenario, *, out: Path, without_faults: bool = False, note: Note = print
) -> Timeline:
    """Run a scenario in the folder `out`, which must be empty; return what happened, judged.

    Leaves in `out`: timeline.json, timeline.svg, timeline.png, job.yaml, the output of the command,
    and the folders of the runs. With `without_faults` the faults are left out: then a good scenario
    fails.

    Raises: LabError when there could be no run.
    """
    out.mkdir(parents=True, exist_ok=True)
    started_at = time.time()
    with Lab.up(scenario.lab, log=note) as lab, _hooks(lab):
        up_s = time.time() - started_at
        timeline = _Play(scenario, lab, out.resolve(), note).run(without_faults=without_faults)
        ended_at = time.time()
    timeline.started_at = started_at
    timeline.durations_s |= {"lab_up": up_s, "lab_down": time.time() - ended_at}
    timeline.failures = [dataclasses.asdict(f) for f in judge(scenario.file.expect, timeline)]
    save(timeline, out / "timeline.json")
    draw_apart(out)
    return timeline


def draw_apart(out: Path) -> None:
    """Draw the timeline in a process of its own, so that this one stays without matplotlib.

    Raises: LabError when it cannot be drawn.
    """
    names = ("timeline.json", "timeline.svg", "timeline.png")
    command = [sys.executable, "-m", "gangline.orchestrator.timeline_plot"]
    command += [str(out / name) for name in names]
    drawn = subprocess.run(command, capture_output=True, text=True, check=False)
    if drawn.returncode != 0:
        raise LabError(f"the timeline could not be drawn: {drawn.stderr.strip()[-300:]}")


@contextmanager
def _hooks(lab: Lab) -> Iterator[None]:
    """Make the folder by which workers know that they are in a lab, on every host."""
    for host in lab.hosts.values():
        host.path(FOLDER).mkdir(mode=stat.S_IRWXU, exist_ok=True)
    yield


class _Play:
    """One scenario on a lab that is up."""

    def __init__(self, scenario: Scenario, lab: Lab, out: Path, note: Note) -> None:
        self._scenario, self._lab, self._out, self._note = scenario, lab, out, note
        self._host = lab.hosts[scenario.lab.head]
        self._mlflow: MlflowServer | None = None
        self._run_dir: Path | None = None
        self._durations_s: dict[str, float] = {}

    def run(self, *, without_faults: bool) -> Timeline:
        """Play it."""
        file = self._scenario.file
        with ExitStack() as cleanup:
            if file.mlflow_host is not None:
                self._start_mlflow(self._lab.hosts[file.mlflow_host], cleanup)
            twin = self._run_twin() if self._scenario.needs_twin else None
            timeline = self._run_with_faults(leave_out=without_faults)
            timeline.twin = twin
            if file.resume:
                self._resume(timeline)
            self._count(timeline)
        timeline.durations_s |= self._durations_s
        return timeline

    def _start_mlflow(self, host: Host, cleanup: ExitStack) -> None:
        start_s = time.monotonic()
        self._mlflow = server = MlflowServer(host, self._out / "mlflow")
        server.start()
        cleanup.callback(server.kill)
        server.wait_ready()
        self._durations_s["mlflow_up"] = time.monotonic() - start_s

    # The runs

    def _run_twin(self) -> Json:
        """Run the job without a fault; return its end."""
        self._note("the twin: the same job without faults")
        job = self._job_here(tracked=False)
        with self._command("twin", "run", self._write_job("twin", job)) as command:
            command.wait(self._scenario.file.timeout_s, lambda: None)
        reader = RunReader(command.run_dir)
        reader.poll()
        reader.close()
        state, reason, weights = end_of(reader.events)
        self._durations_s["twin"] = command.wall_s
        self._note(f"the twin: {state} in {command.wall_s:.1f} s, weights {weights[:16]}")
        return {"state": state, "reason": reason, "weights_sha256": weights}

    def _run_with_faults(self, *, leave_out: bool) -> Timeline:
        scenario, lab = self._scenario, self._lab
        timeline = Timeline(scenario.file.name, 0.0, list(lab.hosts))
        stage = Stage(lab, self._note, self._mlflow)
        health = HealthWatch(self._mlflow) if self._mlflow else None
        links = LinkWatch(lab.links)
        job = self._write_job("job", self._job_here(tracked=True))
        reader: RunReader | None = None
        progress = Progress(time.time())
        with self._command("run", "run", job) as command:
            links.start()
            if health is not None:
                health.start()

            def look() -> None:
                nonlocal reader, progress
                if reader is None and command.has_run_dir():
                    stage.run_dir = command.run_dir
                    reader = RunReader(command.run_dir)
                if reader is not None:
                    reader.poll()
                    progress = reader.progress(command.started_at)

            with injected(scenario.file.faults, stage, lambda: progress, leave_out=leave_out) as r:
                exit_code = command.wait(scenario.file.timeout_s, look)
                timeline.command_ended_at = time.time()
                timeline.faults = r
        timeline.command_started_at, timeline.exit_code = command.started_at, exit_code
        self._durations_s["job"] = command.wall_s
        look()
        timeline.links = links.stop()
        if health is not None:
            timeline.metrics = {"down_s": health.stop()}
        if reader is not None:
            reader.fill(timeline)
            reader.close()
        ended = command.result() or self._shown(command)
        timeline.state = ended.get("state") or timeline.state
        timeline.reason = ended.get("reason") or timeline.reason or command.last_error()
        timeline.leftovers = self._leftovers(timeline)
        self._note(f"the job: {timeline.state or 'no end'} in {command.wall_s:.1f} s")
        self._run_dir = command.run_dir if command.has_run_dir() else None
        return timeline

    def _resume(self, timeline: Timeline) -> None:
        """Resume the run on a Ray of its own: the lab's may be what was lost."""
        if self._run_dir is None:
            timeline.resumed = {"state": "", "reason": "nothing to resume", "from_step": None}
            return
        num_events, num_steps = len(timeline.events), len(timeline.steps)
        self._note("resuming on a Ray of its own")
        changes = ["--set", "cluster.address=null", "--set", "cluster.token_file=null"]
        with self._command("resume", "resume", self._run_dir.name, *changes) as command:
            exit_code = command.wait(self._scenario.file.timeout_s, lambda: None)
        reader = RunReader(self._run_dir)
        reader.poll()
        reader.close()
        state, reason, weights = end_of(reader.events[num_events:])
        again = sorted(reader.steps[num_steps:], key=lambda step: float(step["time"]))
        timeline.resumed = {
            "exit_code": exit_code,
            "state": state,
            "reason": reason or command.last_error(),
            "weights_sha256": weights,
            "from_step": again[0]["step"] - 1 if again else None,
        }
        self._durations_s["resume"] = command.wall_s

    # Parts

    def _job_here(self, *, tracked: bool) -> Job:
        """Return the job with what the lab decides about: where it runs, and where it writes."""
        job, ray = self._scenario.job, self._lab.ray
        assert ray is not None, "checked when the scenario was loaded"
        cluster = job.cluster.model_copy(
            update={"address": ray.gcs_address, "token_file": str(ray.token_file)}
        )
        tracking = job.tracking
        if self._mlflow is not None:
            uri = {"uri": self._mlflow.uri} if tracked else {"enabled": False}
            tracking = tracking.model_copy(update=uri)
        storage = job.storage.model_copy(update={"root": str(self._root)})
        changes = {"cluster": cluster, "storage": storage, "tracking": tracking}
        return job.model_copy(update=changes)

    @property
    def _root(self) -> Path:
        """Where runs are, as the host sees it."""
        return self._host.scratch / "runs" if self._scenario.file.on_scratch else self._out / "runs"

    def _shown(self, command: LabCommand) -> Json:
        """Return what `gangline show` says of a run whose command had no last word on it."""
        if not command.has_run_dir():
            return {}
        with self._command("show", "show", command.run_dir.name) as show:
            show.wait(_SHOW_TIMEOUT_S, lambda: None)
            return show.document()

    def _write_job(self, name: str, job: Job) -> str:
        path = self._out / f"{name}.yaml"
        path.write_text(dump_job(job))
        return str(path)

    @contextmanager
    def _command(self, name: str, *words: str) -> Iterator[LabCommand]:
        command = LabCommand(self._host, self._out / name, [*words, "--runs", str(self._root)])
        try:
            yield command
        finally:
            command.end()

    def _leftovers(self, timeline: Timeline) -> list[str]:
        """Return the processes of the job that are still there some seconds after its end.

        A host that was cut off to the end is not asked: nobody could tell its workers. They end by
        themselves when their lease is over.
        """
        cut_off = {
            fault.host for fault in timeline.faults if fault.lasts and fault.ended_at is None
        }
        hosts = [host for host in self._lab.hosts.values() if host.name not in cut_off]
        found: list[str] = []

        def none_left() -> bool:
            found[:] = [f"{host.name}: {title}" for host in hosts for title in _titles(host)]
            return not found

        wait_until(none_left, _LEFTOVER_TIMEOUT_S, 0.2)
        return found

    def _count(self, timeline: Timeline) -> None:
        """Count samples and points, where the scenario asks for them."""
        job, expect, run_dir = self._scenario.job, self._scenario.file.expect, self._run_dir
        if run_dir is None or job.kind != "train":
            return
        steps = timeline.num_steps = job.training.steps
        if expect.samples is not None:
            timeline.samples = count_samples(run_dir / "ledger", steps, job.training.batch_size)
        if expect.metrics is not None and self._mlflow is not None:
            stored = stored_steps(self._mlflow.database, run_dir.name, steps)
            timeline.metrics = {**(timeline.metrics or {}), **stored}


def _titles(host: Host) -> list[str]:
    titles = []
    for inner_pid, pid in host.pids().items():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if any(word in command for word in _OURS):
            shown = command.replace(b"\0", b" ").decode(errors="replace").strip()
            titles.append(f"pid {inner_pid} {shown[:80]}")
    return titles
