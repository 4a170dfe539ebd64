"""A cluster of virtual hosts on this machine, with real links and real faults.

    with Lab.up(load_lab("two_hosts.yaml"), log=print) as lab:
        lab.hosts["host0"].run(["hostname"])
        lab.links["host1"].blackhole("a_to_b")

Everything hangs on processes and file descriptors: whatever becomes of the process that made the
lab, the kernel ends the processes of every host and removes every link. Read next: `lab_file`,
`lab_fabric` (the plan), `lab_namespaces` (what holds it), `lab_links`, `lab_host`, `lab_ray`.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from gangline.orchestrator import lab_namespaces
from gangline.orchestrator.errors import LabError
from gangline.orchestrator.lab_fabric import (
    OPTIONAL_SETTINGS,
    SEED_SETTING,
    FabricPlan,
    plan_fabric,
    routes,
    with_paths,
)
from gangline.orchestrator.lab_file import LabFile
from gangline.orchestrator.lab_host import Host
from gangline.orchestrator.lab_links import (
    Direction,
    End,
    Link,
    LinkBytes,
    Network,
    end_tool,
    in_network,
    run_tool,
    start_tool,
    tool,
)
from gangline.orchestrator.lab_ray import RayCluster, num, start_ray

__all__ = [
    "Direction",
    "End",
    "Host",
    "Lab",
    "LabError",
    "LabFile",
    "Link",
    "LinkBytes",
    "Network",
    "RayCluster",
    "in_network",
    "why_no_lab",
]

Log = Callable[[str], None]

_START_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 20.0
_TOOLS = ("ip", "tc")
_IN_A_CONTAINER = (
    "in a container it takes --privileged, or the capability SYS_ADMIN and no seccomp profile"
)


def why_no_lab() -> str | None:
    """Say in one line why this machine cannot hold a lab, and the mend; None if it can."""
    if not sys.platform.startswith("linux"):
        return "a lab needs Linux; use a Linux machine or virtual machine"
    missing = [name for name in _TOOLS if tool(name) is None]
    if missing:
        return f"a lab needs {' and '.join(missing)}; install iproute2"
    if os.geteuid() != 0:
        return "a lab needs root, for network namespaces; run it with sudo"
    program = [sys.executable, "-I", "-S", lab_namespaces.__file__, "probe"]
    probe = subprocess.run(program, capture_output=True, text=True)
    if probe.returncode != 0:
        return f"a lab needs namespaces of its own: {probe.stdout.strip()}; {_IN_A_CONTAINER}"
    return None


class Lab:
    """A running lab. Made by `Lab.up`."""

    def __init__(self, lab_file: LabFile, plan: FabricPlan, made: dict[str, Any], pid: int) -> None:
        self.file = lab_file
        self.plan = plan
        self.hosts: dict[str, Host] = {}
        self.networks: dict[str, Network] = {}
        self.ray: RayCluster | None = None
        self.up_s = 0.0  # how long it took to come up
        self._route_lock = threading.Lock()
        for index, (name, parts) in enumerate(made["hosts"].items()):
            network = Network(name, f"/proc/{parts['pid']}/ns/net", parts["net"])
            self.networks[name] = network
            self.hosts[name] = Host(
                name, index, plan.ips[name], parts["pid"], network, parts["processes"]
            )
        for name, parts in made["switches"].items():
            self.networks[name] = Network(name, f"/proc/{pid}/fd/{parts['fd']}", parts["net"])
        self.links: dict[str, Link] = {
            name: Link(link, self._end(link.a), self._end(link.b), self._update_routes)
            for name, link in plan.links.items()
        }
        for host in self.hosts.values():
            host.links = tuple(
                link for link in self.links.values() if link.a.network == host.network
            )

    @classmethod
    @contextmanager
    def up(cls, lab_file: LabFile, *, log: Log | None = None) -> Iterator[Lab]:
        """Bring a lab up for the length of the block. `log` gets a line per stage.

        Raises: LabError with the first thing that failed.
        Guarantees: at the end of the block, or of this process in whatever way, nothing is left.
        """
        why_not = why_no_lab()
        if why_not:
            raise LabError(why_not)
        tell: Log = log or (lambda line: None)
        start_s = time.monotonic()
        plan = plan_fabric(lab_file)
        with ExitStack() as cleanup, _anchored(lab_file, plan) as (made, pid):
            lab = cls(lab_file, plan, made, pid)
            cleanup.callback(lab._reap)
            lab._make_network()
            tell(
                f"{num(lab.hosts, 'host')} and {num(lab.links, 'link')} are up "
                f"({time.monotonic() - start_s:.2f} s)"
            )
            if lab_file.ray.enabled:
                lab.ray = start_ray(lab_file, lab.hosts, tell)
            lab.up_s = time.monotonic() - start_s
            yield lab

    def net(self, network: Network, *argv: str) -> str:
        """Run ip, tc or bridge in a network of the lab; return what it printed.

        Raises: LabError with the tool's own words when it fails.
        """
        return run_tool(network, argv)

    def in_network(self, network: Network) -> Any:
        """Move this thread into a network for the length of a block (see `lab_links`)."""
        return in_network(network)

    def spine_of(
        self, source: str, to: str, *, source_port: int, port: int, plane: int = 0
    ) -> int | None:
        """Ask the kernel over which spine a TCP connection goes; None if over none.

        `source` and `to` are hosts; the answer holds for what `source` sends.
        """
        if self.plan.leaf_of[source] == self.plan.leaf_of[to]:
            return None
        leaf = self.networks[self.links[self._link_name(source, plane)].b.network.name]
        found = self.net(
            leaf, "ip", "-json", "route", "get", self.plan.ips[to][plane],
            "from", self.plan.ips[source][plane], "iif", "br0",
            "ipproto", "tcp", "sport", str(source_port), "dport", str(port),
        )  # fmt: skip
        return int(json.loads(found)[0]["dev"].removeprefix("s"))

    def _reap(self) -> None:
        """Wait for what of our child processes has ended with its host."""
        for host in self.hosts.values():
            for process in host.services:
                process.wait()

    def _link_name(self, host: str, plane: int) -> str:
        return self.hosts[host].links[plane].name

    def _end(self, end: tuple[str, str]) -> End:
        network, interface = end
        return End(self.networks[network], interface)

    def _make_network(self) -> None:
        for name, network in self.networks.items():
            with in_network(network):
                for key, value in self.plan.networks[name].settings.items():
                    _set(key, value)
        paths = {name: network.path for name, network in self.networks.items()}
        parts = self.plan.networks
        self._everywhere(
            "ip", {n: [with_paths(line, paths) for line in p.make] for n, p in parts.items()}
        )
        learned = routes(self.plan)
        self._everywhere("ip", {n: [*p.configure, *learned.get(n, ())] for n, p in parts.items()})
        self._everywhere("tc", {n: p.shape for n, p in parts.items()})

    def _everywhere(self, program: str, lines: dict[str, list[str]]) -> None:
        """Run a tool in several networks at once, each with lines of its own."""
        argv = [program, "-batch", "-"]
        started = [
            (self.networks[name], start_tool(self.networks[name], argv), own)
            for name, own in lines.items()
            if own
        ]
        problems = []
        for network, process, own in started:
            try:
                end_tool(network, argv, process, own)
            except LabError as error:
                problems.append(error)
        if problems:
            raise problems[0]

    def _update_routes(self) -> None:
        """Tell every router which links are left."""
        with self._route_lock:
            down = {link.name for link in self.links.values() if not link.is_up}
            self._everywhere("ip", routes(self.plan, down))


@contextmanager
def _anchored(lab_file: LabFile, plan: FabricPlan) -> Iterator[tuple[dict[str, Any], int]]:
    """Start the process that holds the namespaces; yield what it made, and its pid."""
    hosts = list(plan.ips)
    config = {
        "hosts": hosts,
        "switches": [name for name in plan.networks if name not in plan.ips],
        "scratch_bytes": lab_file.scratch_mb * 2**20,
        "etc_hosts": "".join(
            f"{ip} {name if plane == 0 else f'{name}.{plane}'}\n"
            for name in hosts
            for plane, ip in enumerate(plan.ips[name])
        ),
        "keeper_pid": os.getpid(),
        # The kernel's signal at a parent's death is at the death of the thread that forked.
        "started_by_main_thread": threading.current_thread() is threading.main_thread(),
    }
    program = [sys.executable, "-I", "-S", lab_namespaces.__file__, "anchor"]
    process = subprocess.Popen(
        [*program, json.dumps(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C in the terminal is ours to act on
    )
    assert process.stdin is not None, "it is a pipe"
    try:
        yield _answer_of(process), process.pid
    finally:
        with suppress(BrokenPipeError), process.stdin as stdin:
            # A closed pipe would not do: a child that we have forked may hold it open.
            stdin.write(b"end\n")
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # and the kernel kills every host
            process.wait()


def _answer_of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None, "it is a pipe"
    ready, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
    line = process.stdout.readline() if ready else b""
    process.stdout.close()
    answer: dict[str, Any] = json.loads(line) if line else {"error": "its anchor did not answer"}
    if "error" in answer:
        raise LabError(
            f"the lab's namespaces could not be made: {answer['error']}; {_IN_A_CONTAINER}"
        )
    return answer


def _set(key: str, value: str) -> None:
    """Set a sysctl of this thread's network.

    Raises: LabError when this kernel does not have it.
    """
    path = "/proc/sys/" + key.replace(".", "/")
    try:
        with open(path, "w") as file:
            file.write(value)
    except FileNotFoundError:
        if key not in OPTIONAL_SETTINGS:
            or_so = ", or set fabric.seed to null" if key == SEED_SETTING else ""
            raise LabError(f"this kernel has no {key}; use Linux 6.11 or newer{or_so}") from None
