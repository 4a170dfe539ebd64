"""A Ray cluster over the hosts of a lab, with token authentication.

Every host runs `ray start --block` with its own folder and token file on its own /dev/shm, so that
Ray's unix sockets have short paths and vanish with the host. Addresses and paths are the same in
every lab: nothing of it can be reached from outside.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gangline.orchestrator.errors import GanglineError, LabError
from gangline.orchestrator.jobs_rest import JobsRest, Token
from gangline.orchestrator.lab_file import LabFile, RayHealth
from gangline.orchestrator.lab_host import Host
from gangline.orchestrator.lab_links import in_network
from gangline.orchestrator.lab_namespaces import SHM

_GCS_PORT, _DASHBOARD_PORT = 6379, 8265
_FOLDER = Path(SHM) / "ray"
_TOKEN_FILE = Path(SHM) / "ray-token"
_LOG = Path(SHM) / "ray-start.log"
_TICK_S = 0.05
_TIMEOUT_S = 60.0
_TIMEOUT_PER_HOST_S = 15.0
# Nothing but our actors runs here: no idle workers are kept warm for tasks.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray would run workers at nice 15, and anything else on this machine would starve them.
    "RAY_worker_niceness": "0",
    # How long whoever has lost the head waits for it; 60 s otherwise.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}


@dataclass(frozen=True)
class RayCluster:
    """The Ray cluster of a lab; addresses and paths are those inside the hosts."""

    address: str  # the dashboard: http://10.77.0.1:8265
    gcs_address: str  # 10.77.0.1:6379
    token_file: Path
    node_ids: Mapping[str, str]  # host name -> Ray's node id (hex)
    environment: Mapping[str, str]  # what a process in a host needs to use the cluster
    hosts: Mapping[str, Host]
    head: Host
    rest: JobsRest  # to be called in the head's network

    def raylet_pids(self) -> dict[str, int]:
        """Return the raylet's pid of each host where one runs, as this machine sees it."""
        return _pids_of(self.hosts, "raylet")

    def gcs_pid(self) -> int | None:
        """Return the pid of the head's control process (GCS), as this machine sees it."""
        return _pids_of({"head": self.head}, "gcs_server").get("head")

    def alive_hosts(self) -> set[str]:
        """Ask the head which hosts' nodes are alive.

        Raises: ClusterError when the head does not answer, LabError when its host is dead.
        """
        return set(_node_ids(self.rest, self.head, self.hosts))


def start_ray(
    lab_file: LabFile, hosts: Mapping[str, Host], log: Callable[[str], None]
) -> RayCluster:
    """Start Ray on every host; return when all nodes have joined and the head takes jobs.

    `log` gets a line per stage.

    Raises: LabError with the words of the first host that could not start.
    """
    start_s = time.monotonic()
    head = hosts[lab_file.head]
    token = secrets.token_hex(32)
    environment = {
        **_SETTINGS,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_TOKEN_FILE),
        "RAY_ADDRESS": f"{head.ips[0]}:{_GCS_PORT}",
        "RAY_API_SERVER_ADDRESS": f"http://{head.ips[0]}:{_DASHBOARD_PORT}",
        # Where Ray looks for a folder `ray` by itself.
        "RAY_TMPDIR": SHM,
    }
    for host in hosts.values():
        with open(host.path(_TOKEN_FILE), "w", opener=_private) as file:
            file.write(token)
        host.ray_environment = environment
    rest = JobsRest(environment["RAY_API_SERVER_ADDRESS"], Token(token, "the lab"))
    start = _Start(lab_file, head, hosts, environment)
    start.run(head)
    start.wait(lambda: _listens(head), "the head's GCS")
    for host in hosts.values():
        if host is not head:
            start.run(host)
    log(f"Ray's head is up on {head.name} ({time.monotonic() - start_s:.1f} s)")
    start.wait(lambda: _takes_jobs(rest, head, hosts), "all nodes")
    log(f"Ray is up on {num(hosts, 'host')} ({time.monotonic() - start_s:.1f} s)")
    return RayCluster(
        address=environment["RAY_API_SERVER_ADDRESS"],
        gcs_address=environment["RAY_ADDRESS"],
        token_file=_TOKEN_FILE,
        node_ids=_node_ids(rest, head, hosts),
        environment=environment,
        hosts=hosts,
        head=head,
        rest=rest,
    )


def num(things: Sized, name: str) -> str:
    """Say how many there are: "1 host", "2 hosts"."""
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


class _Start:
    """The `ray start` commands of a cluster that is coming up."""

    def __init__(
        self,
        lab_file: LabFile,
        head: Host,
        hosts: Mapping[str, Host],
        environment: Mapping[str, str],
    ) -> None:
        self._file, self._head = lab_file, head
        self._environment = environment
        self._processes: dict[Host, subprocess.Popen[Any]] = {}
        self._deadline_s = time.monotonic() + _TIMEOUT_S + _TIMEOUT_PER_HOST_S * len(hosts)

    def run(self, host: Host) -> None:
        """Start Ray on a host, without waiting for it."""
        # What finds a cluster would make `ray start` join it, or refuse.
        hidden = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        env = {k: v for k, v in host.environment().items() if k not in hidden}
        with open(host.path(_LOG), "wb") as log:
            process = self._processes[host] = host.popen(
                self._command(host),
                env=env | _health_settings(self._file.ray.health),
                cwd="/",
                stdout=log,
                stderr=log,
            )
        host.services.append(process)

    def _command(self, host: Host) -> list[str]:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        command += ["--disable-usage-stats", "--include-log-monitor=False"]
        command += [f"--node-ip-address={host.ips[0]}", f"--node-name={host.name}"]
        command += [f"--num-cpus={self._file.cpus_of(host.name)}", "--num-gpus=0"]
        command += [f"--object-store-memory={self._file.ray.object_store_mb * 2**20}"]
        command += [f"--temp-dir={_FOLDER}"]
        if host is not self._head:
            return [*command, f"--address={self._environment['RAY_ADDRESS']}"]
        # --no-monitor: there is nothing to scale.
        command += ["--head", f"--port={_GCS_PORT}", "--no-monitor"]
        return [*command, "--dashboard-host=0.0.0.0", f"--dashboard-port={_DASHBOARD_PORT}"]

    def wait(self, is_up: Callable[[], bool], what: str) -> None:
        """Wait until something is up.

        Raises: LabError when a `ray start` has ended, or at the deadline.
        """
        while not is_up():
            for host, process in self._processes.items():
                if process.poll() is not None:
                    raise LabError(
                        f"Ray could not start on {host.name} (exit code {process.returncode}): "
                        f"{_last_line(host)}"
                    )
            if time.monotonic() > self._deadline_s:
                said = "; ".join(f"{host.name}: {_last_line(host)}" for host in self._processes)
                raise LabError(
                    f"Ray is not up in time, waiting for {what} ({said}); close other programs or "
                    "take fewer hosts"
                )
            time.sleep(_TICK_S)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _health_settings(health: RayHealth) -> dict[str, str]:
    return {
        "RAY_health_check_initial_delay_ms": str(round(health.initial_delay_s * 1000)),
        "RAY_health_check_period_ms": str(round(health.period_s * 1000)),
        "RAY_health_check_timeout_ms": str(round(health.timeout_s * 1000)),
        "RAY_health_check_failure_threshold": str(health.failures),
    }


def _listens(head: Host) -> bool:
    with in_network(head.network), socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((head.ips[0], _GCS_PORT)) == 0


def _takes_jobs(rest: JobsRest, head: Host, hosts: Mapping[str, Host]) -> bool:
    try:
        if len(_node_ids(rest, head, hosts)) < len(hosts):
            return False
        with in_network(head.network):
            rest.jobs()
    except GanglineError:
        return False  # not up yet
    return True


def _node_ids(rest: JobsRest, head: Host, hosts: Mapping[str, Host]) -> dict[str, str]:
    """Return the node id of each host whose node is alive."""
    with in_network(head.network):
        nodes = rest.nodes()
    names = {host.ips[0]: name for name, host in hosts.items()}
    return {names[node["node_ip"]]: str(node["node_id"]) for node in nodes}


def _pids_of(hosts: Mapping[str, Host], name: str) -> dict[str, int]:
    found = {}
    for host_name, host in hosts.items():
        for pid in host.pids().values():
            if _name_of(pid) == name:
                found[host_name] = pid
    return found


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _last_line(host: Host) -> str:
    try:
        text = host.path(_LOG).read_text(errors="replace")
    except OSError:
        return "its log is gone"
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"
