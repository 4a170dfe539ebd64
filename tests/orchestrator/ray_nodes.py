"""A Ray cluster of several nodes on this machine, with token auth, on ports and folders of its own.

It is started with `ray start --block` and ended by its own process groups: `ray stop` would end
every Ray on the machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_START_TIMEOUT_S = 90.0
_RAY = Path(sys.executable).with_name("ray")


class RayNodes:
    """A head and `num_nodes - 1` more nodes of `cpus_per_node` logical CPUs each."""

    def __init__(self, num_nodes: int, *, cpus_per_node: int) -> None:
        # Ray's unix sockets lie below it, and a socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="gl-nodes-", dir="/tmp"))
        self.token = secrets.token_hex(16)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._gcs_port, dashboard_port = free_ports(2)
        self.address = f"http://127.0.0.1:{dashboard_port}"
        self._cpus = cpus_per_node
        try:
            self._start(
                "--head",
                f"--port={self._gcs_port}",
                f"--dashboard-port={dashboard_port}",
                "--dashboard-host=127.0.0.1",
                f"--ray-client-server-port={free_ports(1)[0]}",
                f"--temp-dir={self.folder}",
            )
            self._wait(1)
            # One after the other: two that start at once take each other's socket names.
            for num_there in range(2, num_nodes + 1):
                self._start(f"--address=127.0.0.1:{self._gcs_port}")
                self._wait(num_there)
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to know to use the cluster."""
        return {"RAY_API_SERVER_ADDRESS": self.address, "RAY_AUTH_TOKEN": self.token}

    def _start(self, *options: str) -> None:
        settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_worker_prestart": "0",
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        command = [str(_RAY), "start", "--block", "--disable-usage-stats", *options]
        command += [f"--num-cpus={self._cpus}", "--num-gpus=0"]
        command += ["--object-store-memory=80000000"]
        command += [f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
        log = open(self.folder / f"start-{len(self._processes)}.log", "wb")  # noqa: SIM115
        self._processes.append(
            subprocess.Popen(
                command,
                env=inherited | settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        log.close()

    def _wait(self, num_nodes: int) -> None:
        from gangline.orchestrator.errors import GanglineError
        from gangline.orchestrator.jobs_rest import JobsRest, Token

        rest = JobsRest(self.address, Token(self.token, "the test"))
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                if len(rest.node_resources()) >= num_nodes and rest.jobs() is not None:
                    return
            except GanglineError:
                pass  # not up yet
            for process in self._processes:
                if process.poll() is not None:
                    raise AssertionError(
                        f"ray start ended with {process.returncode}: {self._logs()}"
                    )
            assert time.monotonic() < deadline_s, f"Ray is not up: {self._logs()}"
            time.sleep(0.2)

    def _logs(self) -> str:
        logs = sorted(self.folder.glob("start-*.log"))
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)

    def close(self) -> None:
        """End all nodes and remove their folder."""
        for number, patience_s in ((signal.SIGTERM, 4.0), (signal.SIGKILL, 10.0)):
            for process in self._processes:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue
            deadline_s = time.monotonic() + patience_s
            while any(_group_lives(p) for p in self._processes) and time.monotonic() < deadline_s:
                time.sleep(0.1)
        for process in self._processes:
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def free_ports(num: int) -> list[int]:
    """Return ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(num)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
