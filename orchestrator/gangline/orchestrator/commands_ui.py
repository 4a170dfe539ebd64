"""The command `ui`: MLflow's page on the store of the jobs' metrics, on loopback, until Ctrl-C."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import Parameter

from gangline.orchestrator import api
from gangline.orchestrator.commands_options import Common, JobName
from gangline.orchestrator.errors import ExitCode, GanglineError, NotFoundError

_HOST = "127.0.0.1"
# The first start of a new MLflow version may migrate the database.
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 5.0
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Its job runner is a second set of processes that only needs CPU here.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def ui(
    job: JobName | None = None,
    /,
    *,
    port: Annotated[int, Parameter(help="Port on 127.0.0.1; 0 picks a free one.")] = 0,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Open MLflow on the jobs' metrics; it serves 127.0.0.1 until Ctrl-C.

    With a job whose metrics go to a tracking server, print that server's address instead.
    """
    store = _find_store(job, common.runs)
    if store.startswith(("http://", "https://")):
        common.data(store)
        common.note("the metrics of this job are on that server; open it in a browser")
        return ExitCode.OK
    return _serve(store, port, common)


def _find_store(job: str | None, runs: Path | None) -> str:
    """Return the tracking URI of a job's metrics, or of this runs folder.

    Raises: NotFoundError when nothing has been recorded there.
    """
    root = runs or api.DEFAULT_RUNS
    if job is not None:
        from gangline.orchestrator.job import load_job

        info = api.show(job, runs=runs)
        folder = Path(info.run_dir)
        if (folder / "job.yaml").is_file():
            uri = load_job(folder / "job.yaml", check_paths=False).tracking.uri
            if uri is not None:
                return uri
        root = folder.parent
    database = root.absolute() / "mlflow.db"
    if not database.is_file():
        raise NotFoundError(
            f"no metrics yet: {database} is not there; run a job first, or name another folder "
            "with --runs"
        )
    return f"sqlite:///{database}"


def _serve(store: str, port: int, common: Common) -> int:
    """Run MLflow's server in the foreground; print its address once it answers.

    Raises: GanglineError when it does not come up.
    """
    port = port or _free_port()
    url = f"http://{_HOST}:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port)],
            env=os.environ | _SETTINGS | _store_settings(store),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is ours: we end the whole group
        )
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            common.note(f"starting MLflow on {store}")
            _wait_until_up(process, port, log.fileno())
            common.data(url)
            common.note("Ctrl-C ends it")
            process.wait()
            raise GanglineError(
                f"MLflow ended by itself with exit code {process.returncode}: "
                f"{_last_line(log.fileno())}"
            )
        except KeyboardInterrupt:
            common.note("ended")
            return ExitCode.OK
        finally:
            signal.signal(signal.SIGTERM, before)
            _end(process)


def _store_settings(store: str) -> dict[str, str]:
    # Not on the command line, which every user of the machine can read.
    settings = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_WORKERS": "1"}
    if store.startswith("sqlite:///"):
        folder = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts"
        settings["MLFLOW_ARTIFACTS_DESTINATION"] = str(folder)
    return settings


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log_fd: int) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None:
        connection = http.client.HTTPConnection(_HOST, port, timeout=1.0)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # not listening yet
        finally:
            connection.close()
        if time.monotonic() > deadline_s:
            raise GanglineError(
                f"MLflow did not answer within {_START_TIMEOUT_S:.0f} s: {_last_line(log_fd)}"
            )
        time.sleep(0.2)
    raise GanglineError(
        f"MLflow could not start: {_last_line(log_fd)}; is port {port} taken? try another --port"
    )


def _last_line(log_fd: int) -> str:
    size = os.fstat(log_fd).st_size
    text = os.pread(log_fd, 4096, max(0, size - 4096)).decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it wrote nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server with its workers, which are its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
