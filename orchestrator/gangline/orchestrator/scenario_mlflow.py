"""A real MLflow server on a host of the lab, and what it holds in the end."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from gangline.orchestrator.errors import LabError
from gangline.orchestrator.lab_host import Host
from gangline.orchestrator.lab_links import in_network

Json = dict[str, Any]

_PORT = 5000
_START_TIMEOUT_S = 120.0
_LOOK_EVERY_S = 0.25
_KEY = "train/loss"


class MlflowServer:
    """An `mlflow server` with a SQLite store, on one host."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.uri = f"http://{host.ips[0]}:{_PORT}"
        self.database = folder / "mlflow.db"
        self._artifacts = folder / "artifacts"
        self._log = folder / "server.log"
        self._process: subprocess.Popen[Any] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start it, and return at once."""
        environment = self.host.environment()
        environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true"}
        # The server refuses requests for other names than it knows, against DNS rebinding.
        environment |= {"MLFLOW_SERVER_ALLOWED_HOSTS": f"{self.host.ips[0]}:{_PORT}"}
        command = [sys.executable, "-m", "mlflow", "server", "--host", self.host.ips[0]]
        command += ["--port", str(_PORT), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self._artifacts)]
        with self._log.open("ab") as log:
            self._process = self.host.popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Wait until it answers.

        Raises: LabError when it ends, or does not in two minutes.
        """
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self.is_answering():
            has_ended = self._process is None or self._process.poll() is not None
            if has_ended or time.monotonic() > deadline_s:
                raise LabError(f"the MLflow server did not start; see {self._log}")
            time.sleep(0.1)

    def is_answering(self) -> bool:
        """Ask for its health, from its own host."""
        try:
            with in_network(self.host.network):
                address = f"{self.uri}/health"
                with urllib.request.urlopen(address, timeout=1) as answer:  # noqa: S310
                    return bool(answer.status == 200)
        except (OSError, LabError):
            return False

    def kill(self) -> int:
        """End it and its children with SIGKILL; return how many processes that were."""
        process, self._process = self._process, None
        if process is None:
            return 0
        doomed = self._pids(process.pid)
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        return len(doomed)

    def _pids(self, entry_pid: int) -> list[int]:
        """Return the processes of the server: what the entry into the host started, and theirs."""
        parents = {pid: _parent_of(pid) for pid in self.host.pids().values()}
        found = [pid for pid, parent in parents.items() if parent == entry_pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found


def _parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


class HealthWatch(threading.Thread):
    """Look at the server all the time; `down_s` is for how long it did not answer."""

    def __init__(self, server: MlflowServer) -> None:
        super().__init__(name="health of MLflow", daemon=True)
        self._server = server
        self._stop_asked = threading.Event()
        self.down_s = 0.0

    def run(self) -> None:
        """Look until asked to stop."""
        before_s = time.monotonic()
        while not self._stop_asked.wait(_LOOK_EVERY_S):
            is_up = self._server.is_answering()
            now_s = time.monotonic()
            self.down_s += 0.0 if is_up else now_s - before_s
            before_s = now_s

    def stop(self) -> float:
        """Stop looking; return `down_s`."""
        self._stop_asked.set()
        self.join()
        return self.down_s


def stored_steps(database: Path, run_id: str, num_steps: int) -> Json:
    """Count the points of the loss in the MLflow run of a job against one per step.

    MLflow keeps its rows in SQL, and the server's own file is read here, so that a point that was
    stored twice is seen twice.
    """
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        rows = connection.execute(
            "select m.step from metrics m join runs r on r.run_uuid = m.run_uuid "
            "where m.key = ? and r.name = ? and not exists (select 1 from tags t where "
            "t.run_uuid = m.run_uuid and t.key = 'mlflow.parentRunId')",
            (_KEY, run_id),
        ).fetchall()
    times = Counter(step for (step,) in rows)
    return {
        "num_expected": num_steps,
        "num_missing": sum(step not in times for step in range(1, num_steps + 1)),
        "num_doubled": sum(count - 1 for count in times.values()),
    }
