"""The uploader as a process: both ends of the pipe between it and the one that started it.

The child reads its settings from its standard input, then `flush` and `stop`; the end of the pipe
tells it that its parent is gone, and it exits at once. So a tracking URI with a password never
stands on a command line, and no fork hook of the parent is involved (PR_SET_PDEATHSIG would end
the child with the thread that started it). Dying at any instant loses nothing.

Errors
  UploaderBusyError   another uploader serves the same spool
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gangline.monitoring.config import check_tracking_uri
from gangline.monitoring.redaction import redact_text, redact_uri, secrets_of
from gangline.monitoring.spool_cursor import num_delivered
from gangline.monitoring.spool_reader import last_sequence

if TYPE_CHECKING:
    from gangline.monitoring.tracking_store import TrackingStore

LOG_NAME = "uploader.log"
MAX_LOG_BYTES = 4 * 2**20
EXIT_BUSY = 3
# MLflow's own retries would block one call for minutes (246 s against a dead server, 1209 s
# against a hung one); the uploader has its own. Telemetry is the user's business, not ours.
CHILD_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "GIT_PYTHON_REFRESH": "quiet",
}


class UploaderBusyError(RuntimeError):
    """Say that another uploader serves the spool."""


class UploaderProcess:
    """A running uploader. Keep the object: the child ends with it, or with this process.

    If the child dies first (`poll`), start another; nothing is lost by that.
    """

    def __init__(self, process: subprocess.Popen[bytes], spool_dir: Path, uri: str) -> None:
        self._process = process
        self._spool_dir = spool_dir
        self._uri = uri
        self.log_path = spool_dir / LOG_NAME

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status if the process has ended, else None."""
        return self._process.poll()

    def pending(self) -> int:
        """Return how many records of the spool this target has not received."""
        return num_pending(self._spool_dir, self._uri)

    def wait_drained(self, timeout_s: float) -> bool:
        """Wait until all is delivered; return False after `timeout_s` or if the process ends."""
        deadline = time.monotonic() + timeout_s
        next_flush = 0.0
        while self.pending() > 0:
            now = time.monotonic()
            if now >= deadline or self.poll() is not None:
                return self.pending() == 0
            if now >= next_flush:
                self._tell("flush")
                next_flush = now + 0.5
            time.sleep(0.02)
        return True

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the process after its current request, by force after `timeout_s`."""
        self._tell("stop")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None, "spawn_uploader opened the pipe"
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None, "spawn_uploader opened the pipe"
        # A dead child shows in poll().
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()


def num_pending(spool_dir: Path, uri: str) -> int:
    """Return how many records of a spool the target `uri` has not received."""
    seq, num_postponed = num_delivered(spool_dir, uri)
    return max(last_sequence(spool_dir) - seq, 0) + num_postponed


def spawn_uploader(
    spool_dir: Path,
    tracking_uri: str,
    artifact_root: Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    interval_s: float = 1.0,
    request_timeout_s: int = 20,
    max_backoff_s: float = 10.0,
) -> UploaderProcess:
    """Start the uploader of a spool in a process (group) of its own, at low priority.

    `artifact_root` is where the artifacts of a database store go; a server decides for itself.
    `env` is the child's environment (None: this process's): credentials of artifact stores and
    proxies come from there. What it does and what fails is in `uploader.log` in the spool folder.

    Raises: ValueError for a URI to which points cannot be delivered exactly once.
    """
    check_tracking_uri(tracking_uri)
    spool_dir.mkdir(parents=True, exist_ok=True)
    settings = {**CHILD_ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(request_timeout_s)}
    # Through env(1), so that the rest of the environment is passed on without being read here.
    command = ["/usr/bin/env", *(f"{name}={value}" for name, value in settings.items())]
    command += [sys.executable, "-m", "gangline.monitoring.tracker", "--spool", str(spool_dir)]
    with (spool_dir / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
        )
    handle = UploaderProcess(process, spool_dir, tracking_uri)
    start = {
        "uri": tracking_uri,
        "artifact_root": None if artifact_root is None else str(artifact_root.resolve()),
        "interval_s": interval_s,
        "max_backoff_s": max_backoff_s,
        "parent_pid": os.getpid(),
    }
    handle._tell(json.dumps(start))
    return handle


def drain(
    spool_dir: Path,
    uri: str,
    timeout_s: float,
    artifact_root: Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
) -> int:
    """Deliver a spool whose job is over; return how many records are left after `timeout_s`.

    Raises: UploaderBusyError if the job, or another drain, is delivering it.
    """
    if num_pending(spool_dir, uri) == 0:
        return 0
    uploader = spawn_uploader(spool_dir, uri, artifact_root, env=env)
    try:
        uploader.wait_drained(timeout_s)
        if uploader.poll() == EXIT_BUSY:
            raise UploaderBusyError(
                f"another uploader serves {spool_dir}; wait for it, or end the job that owns it"
            )
    finally:
        uploader.stop()
    return uploader.pending()


def serve(arguments: Sequence[str], make_store: Callable[[str, Path | None], TrackingStore]) -> int:
    """Run the child: deliver the spool every second until `stop` or the end of the parent."""
    parser = argparse.ArgumentParser(description=__doc__, prog="gangline.monitoring.tracker")
    parser.add_argument("--spool", type=Path, required=True, help="folder of the spool")
    parser.add_argument("--uri", help="deliver once to this target, for a start by hand")
    parser.add_argument("--artifact-root", help="artifacts of a database store")
    options = parser.parse_args(arguments)
    by_hand = options.uri is not None
    start = {"uri": options.uri, "artifact_root": options.artifact_root}
    if not by_hand:
        line = _read_line(0)
        if not line:
            return 0  # the parent died before its first word
        start = json.loads(line)
    uri = check_tracking_uri(start["uri"])
    log = RedactingLog(options.spool / LOG_NAME, secrets_of(uri))
    sys.stdout = sys.stderr = log
    lock = (options.spool / "uploader.lock").open("w")
    if not _lock_within(lock, 2.0):
        log.event(f"another uploader serves {options.spool}; this one ends")
        return EXIT_BUSY
    os.nice(10)
    stop, wake = threading.Event(), threading.Event()
    if not by_hand:
        watched = (start.get("parent_pid"), stop, wake)
        threading.Thread(target=_watch_parent, args=watched, daemon=True).start()
    _deliver_until_stopped(options.spool, start, make_store, stop, wake, log)
    return 0


def _read_line(descriptor: int) -> bytes:
    """Read one line and not a byte more: the rest is for the thread that watches the parent."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            return b""
        line += byte
    return line


def _deliver_until_stopped(
    spool_dir: Path,
    start: Mapping[str, object],
    make_store: Callable[[str, Path | None], TrackingStore],
    stop: threading.Event,
    wake: threading.Event,
    log: RedactingLog,
) -> None:
    # Imported late: this module is also the parent's, which needs neither.
    from gangline.monitoring.uploader import Uploader

    uri = str(start["uri"])
    root = start.get("artifact_root")
    store = make_store(uri, None if root is None else Path(str(root)))
    uploader = Uploader(
        spool_dir,
        uri,
        store,
        stop=stop,
        log=log.event,
        max_backoff_s=float(str(start.get("max_backoff_s", 10.0))),
    )
    log.event(f"delivering {spool_dir} to {redact_uri(uri)}")
    while True:
        uploader.deliver()
        if stop.is_set() or "interval_s" not in start:
            break
        wake.wait(float(str(start["interval_s"])))
        wake.clear()
    log.event(f"stopped at record {uploader.cursor.position.seq}")


def _watch_parent(parent_pid: int | None, stop: threading.Event, wake: threading.Event) -> None:
    """Obey the parent's words; exit with it."""
    buffered = b""
    while True:
        ready, _, _ = select.select([0], [], [], 2.0)
        # A forked child of the parent may hold the pipe open: the parent's pid tells then.
        if parent_pid is not None and os.getppid() != parent_pid:
            os._exit(0)
        if not ready:
            continue
        data = os.read(0, 4096)
        if not data:
            os._exit(0)
        *words, buffered = (buffered + data).split(b"\n")
        if b"stop" in words:
            stop.set()
        if words:
            wake.set()


def _lock_within(file: io.TextIOWrapper, timeout_s: float) -> bool:
    """Lock a file, waiting a little for an uploader that is about to end."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        else:
            return True


class RedactingLog(io.TextIOBase):
    """A text stream into a log file of bounded size, in which credentials are masked."""

    def __init__(self, path: Path, secrets: Sequence[str]) -> None:
        self._path = path
        self._secrets = list(secrets)
        self._lock = threading.Lock()

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Append text; the file is moved aside to `.1` when it is large."""
        with self._lock:
            if self._path.exists() and self._path.stat().st_size > MAX_LOG_BYTES:
                os.replace(self._path, self._path.with_suffix(".log.1"))
            with self._path.open("a") as file:
                file.write(redact_text(text, self._secrets))
        return len(text)

    def event(self, message: str) -> None:
        """Write one line with the time."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.write(f"{stamp} {' '.join(message.split())}\n")
