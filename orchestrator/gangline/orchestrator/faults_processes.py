"""Faults of processes: killed, stopped, holding the GIL, slow; raylet, head and host lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

from gangline.orchestrator.cluster import process_start
from gangline.orchestrator.faults import (
    HoldGil,
    KillHead,
    KillHost,
    KillRaylet,
    KillWorker,
    SlowCompute,
    StopWorker,
)
from gangline.orchestrator.faults_hook import answer_path, request_path
from gangline.orchestrator.faults_stage import (
    Aim,
    Begun,
    FaultError,
    Stage,
    death_proof,
    send,
    state_of,
    wait_for,
)
from gangline.orchestrator.timeline import Proof

_SIGNAL_TIMEOUT_S = 2.0
# The hook looks every 50 ms; a worker on a loaded machine is slower to get to it.
_HOOK_TIMEOUT_S = 5.0


def kill_worker(fault: KillWorker, aim: Aim, stage: Stage) -> Begun:
    """SIGKILL the worker of a rank."""
    del fault, stage
    return _kill(f"worker {aim.the_worker.worker_id}", aim.the_worker.pid)


def kill_raylet(fault: KillRaylet, aim: Aim, stage: Stage) -> Begun:
    """SIGKILL the raylet of a host."""
    del fault
    assert stage.lab.ray is not None, "a scenario's lab has Ray"
    pid = stage.lab.ray.raylet_pids().get(aim.the_host.name)
    if pid is None:
        raise FaultError(f"no raylet runs on {aim.the_host.name}")
    return _kill("raylet", pid)


def kill_head(fault: KillHead, aim: Aim, stage: Stage) -> Begun:
    """SIGKILL the GCS process, which is the head of the Ray cluster."""
    del fault, aim
    assert stage.lab.ray is not None, "a scenario's lab has Ray"
    pid = stage.lab.ray.gcs_pid()
    if pid is None:
        raise FaultError("no head runs")
    return _kill("GCS", pid)


def kill_host(fault: KillHost, aim: Aim, stage: Stage) -> Begun:
    """Cut a host's power: its links go silent and all its processes end."""
    del fault, stage
    host = aim.the_host
    start, num_processes = process_start(host.init_pid), len(host.pids())
    at = time.time()
    host.power_off()
    proof = death_proof("init process", host.init_pid, start)
    counted = Proof("processes of the host before", str(num_processes), num_processes > 1)
    return Begun(at, [proof, counted])


def stop_worker(fault: StopWorker, aim: Aim, stage: Stage) -> Begun:
    """SIGSTOP the worker of a rank; SIGCONT it at the end, if it lives."""
    del fault, stage
    worker = aim.the_worker
    start = process_start(worker.pid)
    at = time.time()
    send(worker.pid, signal.SIGSTOP)
    took_s = wait_for(lambda: state_of(worker.pid) == "T", _SIGNAL_TIMEOUT_S)
    found = f"state {state_of(worker.pid)}" + (f" after {took_s * 1e3:.0f} ms" if took_s else "")
    stopped = Proof(f"SIGSTOP to pid {worker.pid} outside", found, took_s is not None)

    def go_on() -> list[Proof]:
        if process_start(worker.pid) != start:
            return [Proof(f"pid {worker.pid} at the end", "ended meanwhile", True)]
        send(worker.pid, signal.SIGCONT)
        took_s = wait_for(lambda: state_of(worker.pid) not in ("T", ""), _SIGNAL_TIMEOUT_S)
        return [Proof("SIGCONT", f"state {state_of(worker.pid)}", took_s is not None)]

    return Begun(at, [stopped], go_on)


def hold_gil(fault: HoldGil, aim: Aim, stage: Stage) -> Begun:
    """Ask the lab's hook in the worker to sleep with the interpreter's lock in its hand."""
    del stage
    worker = aim.the_worker
    start = process_start(worker.pid)
    request = worker.host.path(request_path(worker.inner_pid))
    answer = worker.host.path(answer_path(worker.inner_pid))
    at = time.time()
    draft = request.with_name(f".{request.name}")
    draft.write_text(json.dumps(fault.for_s))
    draft.replace(request)
    took_s = wait_for(answer.exists, _HOOK_TIMEOUT_S)
    if took_s is None:
        raise FaultError(f"the hook in pid {worker.pid} has not answered in {_HOOK_TIMEOUT_S:g} s")
    held = Proof(
        f"GIL of pid {worker.pid} outside",
        f"held after {took_s * 1e3:.0f} ms, state {state_of(worker.pid)}",
        state_of(worker.pid) in ("S", "R"),
    )

    def let_go() -> list[Proof]:
        wait_for(lambda: process_start(worker.pid) != start or _held_s(answer) is not None, 2.0)
        held_s = _held_s(answer)
        if held_s is None:
            is_gone = process_start(worker.pid) != start
            found = "ended meanwhile, still holding it" if is_gone else "not let go"
            return [Proof(f"pid {worker.pid} at the end", found, is_gone)]
        return [Proof("held for", f"{held_s:.2f} s", held_s >= 0.9 * fault.for_s)]

    return Begun(at + took_s, [held], let_go)


def _held_s(answer: Path) -> float | None:
    try:
        text = answer.read_text()
    except OSError:
        return None
    return float(text) if text else None


def slow_compute(fault: SlowCompute, aim: Aim, stage: Stage) -> Begun:
    """Stop and continue the worker of a rank, over and over."""
    del stage
    worker = aim.the_worker
    duty = _DutyCycle(worker.pid, 1 - 1 / fault.slowdown, fault.period_s)
    at = time.time()
    duty.start()

    def let_run() -> list[Proof]:
        duty.stop()
        return [duty.proof()]

    first = wait_for(lambda: duty.num_stops > 0, _SIGNAL_TIMEOUT_S)
    began = Proof(f"first SIGSTOP to pid {worker.pid} outside", "sent", first is not None)
    return Begun(at, [began], let_run)


class _DutyCycle(threading.Thread):
    """Let a process run only a part of each period."""

    def __init__(self, pid: int, stopped_share: float, period_s: float) -> None:
        super().__init__(name=f"duty cycle of {pid}", daemon=True)
        self._pid, self._share, self._period_s = pid, stopped_share, period_s
        self._stop_asked = threading.Event()
        self._stopped_s = self._total_s = 0.0
        self._num_seen_stopped = 0
        self.num_stops = 0

    def run(self) -> None:
        """Alternate until asked to stop, or until the process ends."""
        descriptor = os.pidfd_open(self._pid)
        start_s = time.monotonic()
        try:
            while not self._stop_asked.is_set():
                signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
                stop_s = time.monotonic()
                self.num_stops += 1
                time.sleep(self._share * self._period_s)
                self._num_seen_stopped += state_of(self._pid) == "T"
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
                self._stopped_s += time.monotonic() - stop_s
                self._stop_asked.wait((1 - self._share) * self._period_s)
        except ProcessLookupError:
            pass  # it has ended, which the proof will show
        finally:
            self._total_s = time.monotonic() - start_s
            os.close(descriptor)

    def stop(self) -> None:
        """Let the process run again."""
        self._stop_asked.set()
        self.join()

    def proof(self) -> Proof:
        """Prove that the process was stopped for about the part of the time that was wanted."""
        share = self._stopped_s / max(1e-9, self._total_s)
        found = f"{share:.0%} of {self._total_s:.1f} s in {self.num_stops} stops"
        found += f", {self._num_seen_stopped} of them seen"
        holds = share > 0.7 * self._share and self._num_seen_stopped > 0.5 * self.num_stops
        return Proof(f"stopped {self._share:.0%} of the time", found, holds)


def _kill(what: str, pid: int) -> Begun:
    start = process_start(pid)
    at = time.time()
    send(pid, signal.SIGKILL)
    return Begun(at, [death_proof(what, pid, start)])
