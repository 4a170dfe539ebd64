"""What is left of a lab when it is over, however it ended; and labs in the background."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gangline.orchestrator import lab_namespaces
from gangline.orchestrator.cluster import process_start
from gangline.orchestrator.errors import LabError
from gangline.orchestrator.lab import Host, Lab

from .lab_tools import a_lab, needs_lab, nothing_left_behind, processes_with

pytestmark = needs_lab

NUM_CYCLES = 20
GANGLINE = [sys.executable, "-m", "gangline.orchestrator.cli"]


def sleeper(host: Host, mark: str) -> subprocess.Popen[str]:
    """Start a program in a host that nobody waits for, in a session of its own."""
    script = f"echo ready; exec setsid sleep {mark}"
    process = host.popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as lines:
        assert lines.readline() == "ready\n"
    return process


def test_twenty_labs_one_after_the_other_leave_nothing():
    mark = f"96{os.getpid()}.5"
    fabrics = ["hosts: 4", "hosts: 3\nfabric: {kind: leaf_spine, spines: 2, planes: 2}"]
    up_s, down_s = [], []
    with Lab.up(a_lab()):
        pass  # what the first one loads is there before
    with nothing_left_behind(f"sleep {mark}"):
        for cycle in range(NUM_CYCLES):
            with Lab.up(a_lab(fabrics[cycle % 2])) as lab:
                for host in lab.hosts.values():
                    host.services.append(sleeper(host, mark))
                lab.links["host0"].blackhole()
                up_s.append(lab.up_s)
                start_s = time.monotonic()
            down_s.append(time.monotonic() - start_s)
    print(f"up {min(up_s):.3f} to {max(up_s):.3f} s, down {min(down_s):.3f} to {max(down_s):.3f} s")
    assert min(up_s[::2]) < 1.0, "4 hosts"
    assert min(down_s[::2]) < 0.5


def test_an_error_in_the_block_takes_the_lab_down():
    with nothing_left_behind(), pytest.raises(ZeroDivisionError), Lab.up(a_lab()):
        raise ZeroDivisionError


def test_a_forked_child_of_ours_does_not_keep_a_lab_up():
    with Lab.up(a_lab()) as lab:
        child = os.fork()  # it has a copy of every descriptor
        if child == 0:
            time.sleep(60)
            os._exit(0)
        start_s = time.monotonic()
    try:
        assert time.monotonic() - start_s < 5.0
        assert not any(host.is_alive for host in lab.hosts.values())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_labs_at_once_have_the_same_addresses_and_do_not_meet():
    with Lab.up(a_lab()) as one, Lab.up(a_lab("hosts: 3")) as two:
        assert one.hosts["host0"].ips == two.hosts["host0"].ips
        one.links["host0"].set_carrier(False)
        ping = "import socket; socket.create_connection(('host2', 9), 2)"
        done = two.hosts["host0"].run([sys.executable, "-I", "-c", ping])
        assert "refused" in done.stderr, "host2 of the second lab answers"
        assert one.hosts["host0"].run(["getent", "hosts", "host2"]).returncode != 0


def test_a_lab_that_cannot_be_made_says_why_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr("gangline.orchestrator.lab_fabric.tbf", lambda mbit: "no-such-queue")
    wanted = r"host0: tc qdisc replace dev eth0 root no-such-queue: .*unknown"
    with nothing_left_behind(), pytest.raises(LabError, match=wanted), Lab.up(a_lab()):
        pass


KEEPER = """
import subprocess, sys, time
from gangline.orchestrator.lab import Lab
from gangline.orchestrator.lab_file import load_lab

script = f"echo ready; exec setsid sleep {sys.argv[1]}"
with Lab.up(load_lab("hosts: 3\\nray: {enabled: false}\\n")) as lab:
    for host in lab.hosts.values():
        host.popen(["sh", "-c", script], stdout=subprocess.PIPE).stdout.readline()
    print(*(host.init_pid for host in lab.hosts.values()), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("whom", ["keeper", "anchor"])
def test_the_kernel_ends_everything_when_a_process_that_holds_it_is_killed(whom):
    mark = f"95{os.getpid()}.5"
    with nothing_left_behind(f"sleep {mark}"):
        command = [sys.executable, "-c", KEEPER, mark]
        keeper = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert keeper.stdout is not None
        inits = [int(word) for word in keeper.stdout.readline().split()]
        assert len(inits) == 3
        ours = f'"keeper_pid": {keeper.pid}'
        (anchor,) = processes_with(ours).keys() - set(inits)
        inside = _processes_in({_network_of(pid) for pid in inits})
        assert len(inside) >= 3 * 2, "in each an init and a program"
        start_s = time.monotonic()
        os.kill(keeper.pid if whom == "keeper" else anchor, signal.SIGKILL)
        while any(process_start(pid) for pid in inits) or processes_with(f"sleep {mark}", ours):
            assert time.monotonic() - start_s < 3.0, "something goes on"
            time.sleep(0.005)
        print(f"all gone {time.monotonic() - start_s:.3f} s after the {whom}")
        assert not [pid for pid, start in inside.items() if process_start(pid) == start]
        keeper.kill()
        keeper.communicate()


def _processes_in(networks: set[int | None]) -> dict[int, str | None]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return {pid: process_start(pid) for pid in pids if _network_of(pid) in networks}


def _network_of(pid: int) -> int | None:
    try:
        return lab_namespaces.inode(f"/proc/{pid}/ns/net")
    except OSError:
        return None


class Labs:
    """The `gangline lab` commands, with a state folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "state" / "gangline" / "labs"
        self.lab_file = folder / "small.yaml"
        self.lab_file.write_text("hosts: 2\nray: {enabled: false}\n")
        self._environment = os.environ | {"XDG_STATE_HOME": str(folder / "state")}

    def __call__(self, *words: str, code: int = 0) -> str:
        """Run a command; return its stdout and stderr."""
        done = subprocess.run(
            [*GANGLINE, "lab", *words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def records(self) -> list[dict]:
        labs: list[dict] = json.loads(self("ls", "--json"))["labs"]
        return labs


@pytest.fixture
def labs(tmp_path):
    labs = Labs(tmp_path)
    yield labs
    for record in labs.records():
        labs("down", record["name"])


def test_a_lab_in_the_background_from_up_to_down(labs):
    assert "no lab" in labs("ls")
    assert "no lab; `gangline lab up FILE` makes one" in labs("exec", "host0", "--", "true", code=3)
    with nothing_left_behind():
        assert labs("up", str(labs.lab_file)).splitlines()[0] == "small"
        assert labs("exec", "host1", "--", "hostname") == "host1\n"
        assert labs("exec", "host0", "--", "sh", "-c", "exit 9", code=9) == ""
        assert "it has host0, host1" in labs("exec", "host7", "--", "true", code=3)
        assert "what shall host0 run?" in labs("exec", "host0", code=2)
        assert "there is a lab small already" in labs("up", str(labs.lab_file), code=1)
        (record,) = labs.records()
        assert record["state"] == "up"
        assert [host["ips"] for host in record["hosts"]] == [["10.77.0.1"], ["10.77.0.2"]]
        assert labs.folder.stat().st_mode & 0o077 == 0, "private"
        assert "ended" in labs("down")
        assert process_start(record["keeper_pid"]) is None
    assert list(labs.folder.iterdir()) == []


def test_labs_have_names_and_a_killed_keeper_leaves_only_a_file(labs):
    labs("up", str(labs.lab_file), "--name", "one")
    labs("up", str(labs.lab_file), "--name", "two", "--set", "hosts=1")
    assert "name one" in labs("exec", "host0", "--", "true", code=3)
    assert labs("exec", "host0", "--lab", "two", "--", "hostname") == "host0\n"
    one, two = labs.records()
    os.kill(one["keeper_pid"], signal.SIGKILL)
    deadline_s = time.monotonic() + 3.0
    while any(process_start(host["init_pid"]) for host in one["hosts"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert [record["state"] for record in labs.records()] == ["dead", "up"]
    assert labs("exec", "host0", "--", "hostname") == "host0\n", "the only one that is up"
    assert "the lab one is dead" in labs("exec", "host0", "--lab", "one", "--", "true", code=1)
    assert "was dead already" in labs("down", "one")
    labs("up", str(labs.lab_file), "--name", "one")  # the name is free again
    assert [record["state"] for record in labs.records()] == ["up", "up"]
    assert two["keeper_pid"] in [record["keeper_pid"] for record in labs.records()]


def test_a_wrong_lab_file_is_refused_before_anything_starts(labs):
    labs.lab_file.write_text("hosts: 2\nrate: 3\n")
    assert f"{labs.lab_file}:2:1: rate: found a key" in labs("up", str(labs.lab_file), code=2)
    assert labs.records() == []
