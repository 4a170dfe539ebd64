"""The process of one rank: it keeps a program warm and runs it once per generation.

The class is plain; `worker_group` makes an actor of it. Every public method is a short call that
answers also while the program runs, because the program has a thread (or a child process) of its
own; the two exceptions are `watch`, which waits for the end of a run, and `warm`.

What a program must do is `Program` below: `train` and `script` jobs each have one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gangline.comm.errors import CommError
from gangline.comm.ring_folders import FolderHold, ring_folder
from gangline.orchestrator.faults_hook import listen_in_a_lab
from gangline.orchestrator.policy import Cause

if TYPE_CHECKING:
    from gangline.monitoring.system_metrics import SystemSampler

Json = dict[str, Any]


@dataclass(frozen=True)
class Assignment:
    """What a worker is in one generation. `master_*` is where the group's store listens."""

    generation: int
    rank: int
    world_size: int
    master_host: str
    master_port: int


@dataclass
class Control:
    """How the worker steers a running program, and what the program tells of itself."""

    should_stop: threading.Event = field(default_factory=threading.Event)
    step: int = 0
    step_time_s: float = 0.0  # time.monotonic() of the last sign of progress
    abort: Callable[[], None] = lambda: None

    def progress(self, step: int) -> None:
        """Note that `step` is done; a hang is the absence of such notes."""
        self.step = step
        self.step_time_s = time.monotonic()


class Program(Protocol):
    """What a worker runs. One object lives as long as the worker, and runs many generations."""

    def prepare(self) -> Json:
        """Do what one worker does for all (tokenise, say); return what the others need of it."""

    def warm(self, shared: Json) -> None:
        """Do all that can be done before the rank is known."""

    def open_store(self, world_size: int, host: str) -> int:
        """Open what the group meets at, on this node's address `host`; return its port."""

    def run(self, assignment: Assignment, control: Control) -> Json:
        """Run one generation to its end; return the result.

        Raises: CommError when another rank failed; anything else is this rank's own fault.
        """


class Worker:
    """Hold one program, start it, stop it, and say how it is."""

    def __init__(
        self,
        worker_id: str,
        run_dir: str,
        ip: Callable[[], str],
        make_program: Callable[[], Program],
        lease_s: float,
    ) -> None:
        self.worker_id = worker_id
        self._run_dir = Path(run_dir)
        self._logs = self._run_dir / "logs"
        if self._logs.is_dir():
            self._redirect_output(f"worker-{worker_id}.log")
        faulthandler.enable()
        listen_in_a_lab()
        self._ip = ip()
        _bind_gloo_to(self._ip)
        self._program = make_program()
        self._lock = threading.Lock()
        self._generation = -1
        self._control = Control()
        self._thread: threading.Thread | None = None
        self._outcome: Json | None = None
        self._ended = threading.Event()
        self._last_contact = time.monotonic()
        self._sampler: SystemSampler | None = None
        self._rings: FolderHold | None = None
        threading.Thread(target=self._watch_lease, args=(lease_s,), daemon=True).start()

    def prepare(self) -> Json:
        """Run the program's `prepare` and return what it gives."""
        return self._program.prepare()

    def warm(self, shared: Json) -> Json:
        """Make the program ready; return where this worker lives (`pid`, `host`, `ip`).

        Raises: FileNotFoundError when this node does not see the run folder.
        """
        self._touch()
        if not self._logs.is_dir():
            raise FileNotFoundError(
                f"{socket.gethostname()} does not see the run folder {self._run_dir}; set "
                "storage.root to a folder that all nodes of the cluster share"
            )
        self._program.warm(shared)
        if _has_torch():
            build_recorder()  # now, while no other rank waits for this one
        return {"pid": os.getpid(), "host": socket.gethostname(), "ip": self._ip}

    def fence(self, generation: int, timeout_s: float) -> Json:
        """End whatever an older generation still does here, and refuse it from now on.

        Returns: `idle`, False when the old run could not be ended within `timeout_s` (the caller
        must then end this process), and the `outcome` of the old run, if there was one.
        """
        self._touch()
        with self._lock:
            self._generation = max(self._generation, generation)
            thread, control = self._thread, self._control
        if thread is not None and thread.is_alive():
            control.should_stop.set()
            control.abort()
            thread.join(timeout_s)
        return {"idle": thread is None or not thread.is_alive(), "outcome": self._outcome}

    def open_store(self, world_size: int) -> int:
        """Open the group's meeting point in this process and return its port."""
        return self._program.open_store(world_size, self._ip)

    def start(self, assignment: Assignment) -> None:
        """Start the program as `assignment` says; return at once.

        Raises: RuntimeError for a stale generation, or while an older run has not ended.
        """
        self._touch()
        with self._lock:
            if assignment.generation < self._generation:
                raise RuntimeError(
                    f"generation {assignment.generation} is stale: {self.worker_id} is fenced to "
                    f"{self._generation}"
                )
            if self._thread is not None and self._thread.is_alive():
                raise RuntimeError(f"{self.worker_id} still runs an older generation")
            self._generation = assignment.generation
            self._control = Control(step_time_s=time.monotonic())
            self._outcome = None
            self._ended = threading.Event()
            self._redirect_output(f"rank-{assignment.rank}.log")
            self._thread = threading.Thread(
                target=self._run, args=(assignment, self._control, self._ended), daemon=True
            )
            self._thread.start()

    def watch(self, generation: int) -> Json:
        """Wait until the run of `generation` has ended; return its outcome.

        A call that never returns is the normal state of a healthy worker: the caller learns of
        the death of this process by the error of this very call, within milliseconds.
        """
        while True:
            with self._lock:
                is_current = self._generation == generation
                ended, outcome = self._ended, self._outcome
            if not is_current:
                return {"outcome": "fenced", "generation": generation}
            if ended.wait(timeout=0.5):
                outcome = self._outcome
            if outcome is not None and outcome["generation"] == generation:
                return outcome

    def poll(self) -> Json:
        """Return this worker's step and the seconds since its last sign of progress."""
        self._touch()
        running = self._thread is not None and self._thread.is_alive()
        quiet_s = time.monotonic() - self._control.step_time_s if running else 0.0
        return {"running": running, "step": self._control.step, "quiet_s": quiet_s}

    def stop(self) -> None:
        """Ask the program to end at its next safe point (a `train` job commits a checkpoint)."""
        self._control.should_stop.set()

    def sample_system(self) -> dict[str, float]:
        """Return a sample of this node's load, by metric name."""
        if self._sampler is None:
            from gangline.monitoring.system_metrics import SystemSampler

            self._sampler = SystemSampler(socket.gethostname(), self._run_dir)
        return self._sampler.sample({self.worker_id: os.getpid()})

    def _run(self, assignment: Assignment, control: Control, ended: threading.Event) -> None:
        outcome: Json = {"generation": assignment.generation, "rank": assignment.rank}
        print(
            f"--- generation {assignment.generation}: rank {assignment.rank} of "
            f"{assignment.world_size}, worker {self.worker_id}, pid {os.getpid()}",
            flush=True,
        )
        try:
            self._start_recording()
            result = self._program.run(assignment, control)
            outcome |= {"outcome": "finished", "result": result}
            self._stop_recording()
        except CommError as error:
            outcome |= {
                "outcome": "failed",
                "cause": Cause.COMMUNICATION.name,
                "detail": str(error),
            }
        except BaseException as error:  # noqa: BLE001 - whatever it was, the controller must hear of it
            traceback.print_exc()
            detail = "".join(traceback.format_exception_only(error)).strip()
            outcome |= {"outcome": "failed", "cause": Cause.RAISED.name, "detail": detail}
        sys.stdout.flush()
        sys.stderr.flush()
        outcome |= {"step": control.step, "time": time.time()}
        self._outcome = outcome
        ended.set()

    def _start_recording(self) -> None:
        """Record this process's communication, and keep what others of the run have recorded.

        After a run that failed the recorder and the records stay, for whoever looks for the cause;
        they go when a later generation finishes, or after the end of this process.
        """
        folder = ring_folder(self._run_dir)
        if self._rings is None:
            try:
                self._rings = FolderHold(folder)
            except OSError as error:
                print(f"communication is not recorded here: {error}", flush=True)
                return
        if _has_torch():
            from gangline.comm import recorder

            recorder.install(folder, label=self.worker_id, report=_print)

    def _stop_recording(self) -> None:
        if _has_torch():
            from gangline.comm import recorder

            recorder.uninstall()
        if self._rings is not None:
            self._rings.release()
            self._rings = None

    def _touch(self) -> None:
        self._last_contact = time.monotonic()

    def _watch_lease(self, lease_s: float) -> None:
        """End this process when no controller has called for `lease_s`: it is an orphan."""
        while time.monotonic() - self._last_contact < lease_s:
            time.sleep(min(lease_s / 10, 5.0))
        print(f"no word from the controller for {lease_s:.0f} s; this worker ends", flush=True)
        os._exit(3)

    def _redirect_output(self, name: str) -> None:
        """Send stdout and stderr, also those of C++ code and children, to a file of the run."""
        sys.stdout.flush()
        sys.stderr.flush()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        log_fd = os.open(self._logs / name, flags, 0o644)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.close(log_fd)
        sys.stdout, sys.stderr = _LogStream(1), _LogStream(2)


class _LogStream(io.TextIOWrapper):
    """Text to a descriptor. A full disk costs lines of a log, never the rank that prints them."""

    def __init__(self, descriptor: int) -> None:
        buffer = io.BufferedWriter(io.FileIO(descriptor, "wb", closefd=False))
        super().__init__(buffer, "utf-8", "backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or keep it for later."""
        with contextlib.suppress(OSError):
            super().flush()


def build_recorder() -> None:
    """Build the recorder of communication unless this machine has it; say so if it cannot be."""
    from gangline.comm import recorder_build

    try:
        recorder_build.build(report=_print)
    except recorder_build.BuildError as error:
        _print(f"communication will be recorded by the slower Python fallback: {error}")


def _has_torch() -> bool:
    """Whether the program has imported torch, so that it may communicate from this process."""
    return "torch" in sys.modules


def _print(line: str) -> None:
    print(line, flush=True)


def _bind_gloo_to(ip: str) -> None:
    """Make gloo listen on the address by which Ray knows this node, unless the user chose one.

    Left alone, gloo resolves the host's name, which on many machines is a loopback address that
    other nodes cannot reach.
    """
    import psutil

    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
