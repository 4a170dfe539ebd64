"""Hosts of a lab: what is theirs and what is the machine's, programs in them, and their end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gangline.orchestrator.errors import LabError
from gangline.orchestrator.lab import Lab

from .lab_tools import a_lab, needs_lab, processes_with

pytestmark = needs_lab


@pytest.fixture(scope="module")
def lab():
    with Lab.up(a_lab("hosts: 2\nscratch_mb: 8")) as lab:
        yield lab


def outer_start(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_until(condition, timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.01)


def test_a_host_has_its_name_its_interfaces_and_its_processes_only(lab):
    host = lab.hosts["host1"]
    script = "hostname; echo $(ls /sys/class/net); ls -d /proc/[0-9]* | wc -l"
    name, interfaces, num_processes = host.run(["sh", "-c", script]).stdout.splitlines()
    assert name == "host1"
    assert interfaces.split() == ["eth0", "lo"]
    assert int(num_processes) < 6, "init, the shell, ls and wc"
    assert int(Path("/proc/self/stat").read_text().split()[0]) == os.getpid(), "ours is as it was"


def test_hosts_know_each_other_by_name(lab):
    found = lab.hosts["host0"].run(["getent", "hosts", "host1"]).stdout.split()
    assert found == ["10.77.0.2", "host1"]


def test_the_machines_files_are_the_hosts_files(lab, tmp_path):
    (tmp_path / "given").write_text("by the machine")
    script = "cat given; echo taken > back"
    done = lab.hosts["host0"].run(["sh", "-c", script], cwd=tmp_path)
    assert done.stdout == "by the machine"
    assert (tmp_path / "back").read_text() == "taken\n"


def test_shared_memory_and_scratch_are_each_hosts_own(lab):
    script = "echo mine > /dev/shm/lab-test; echo mine > /dev/shm/scratch/file"
    assert lab.hosts["host0"].run(["sh", "-c", script]).returncode == 0
    assert lab.hosts["host0"].path("/dev/shm/lab-test").read_text() == "mine\n"
    assert not lab.hosts["host1"].path("/dev/shm/lab-test").exists()
    assert not Path("/dev/shm/lab-test").exists()


def test_scratch_is_a_small_disk_that_can_be_full(lab):
    host = lab.hosts["host1"]
    command = ["dd", "if=/dev/zero", f"of={host.scratch}/big", "bs=1M", "count=20"]
    done = host.run(command)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    assert host.path(host.scratch / "big").stat().st_size == 8 * 2**20
    assert host.run(["rm", f"{host.scratch}/big"]).returncode == 0


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -TERM $$"], -signal.SIGTERM),
        (["sh", "-c", "kill -KILL $$"], -signal.SIGKILL),
        (["no-such-program"], 127),
    ],
    ids=["exit", "terminated", "killed", "missing"],
)
def test_a_popen_ends_as_its_program_does(lab, argv, code):
    assert lab.hosts["host0"].run(argv).returncode == code


def test_a_signal_reaches_the_program_once_also_through_a_group(lab):
    program = (
        "import os, signal, time\n"
        "def note(*_): os.write(1, b'term\\n')\n"
        "signal.signal(signal.SIGTERM, note)\n"
        "print('ready', flush=True)\n"
        "end = time.monotonic() + 0.5\n"
        "while time.monotonic() < end: time.sleep(0.01)\n"
    )
    process = lab.hosts["host0"].popen(
        [sys.executable, "-I", "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)
    rest, _ = process.communicate(timeout=5)
    assert rest == "term\n"
    assert process.returncode == 0


def test_a_program_that_was_stopped_goes_on(lab):
    host = lab.hosts["host0"]
    script = "echo $$; read line; echo $line"
    pipe = subprocess.PIPE
    process = host.popen(["sh", "-c", script], stdin=pipe, stdout=pipe, text=True)
    outer = host.outer_pid(int(process.stdout.readline()))
    os.kill(outer, signal.SIGSTOP)
    wait_until(lambda: " T " in Path(f"/proc/{outer}/stat").read_text())
    process.stdin.write("gone on\n")
    process.stdin.flush()
    os.kill(outer, signal.SIGCONT)
    assert process.communicate(timeout=5)[0] == "gone on\n"


def test_a_broken_pipe_ends_a_program_quietly(lab):
    done = lab.hosts["host0"].run(["sh", "-c", "yes | head -1"], timeout_s=5)
    assert (done.stdout, done.stderr) == ("y\n", "")


def test_the_environment_is_ours_but_for_ray_or_what_is_given(lab, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "another cluster")
    monkeypatch.setenv("FROM_OUTSIDE", "yes")
    host = lab.hosts["host0"]
    found = dict(line.partition("=")[::2] for line in host.run(["env"]).stdout.splitlines())
    assert found["FROM_OUTSIDE"] == "yes"
    assert found["HOSTNAME"] == "host0"
    assert "RAY_ADDRESS" not in found
    assert host.run(["env"], env={"PATH": "/bin:/usr/bin", "A": "1"}).stdout.split() == [
        "PATH=/bin:/usr/bin",
        "A=1",
    ]


def test_pids_of_a_host_are_found_outside(lab):
    host = lab.hosts["host0"]
    process = host.popen(
        [
            sys.executable,
            "-I",
            "-c",
            "import os, time; print(os.getpid(), flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        inner = int(process.stdout.readline())
        outer = host.outer_pid(inner)
        assert outer is not None
        assert outer != inner
        assert b"os.getpid" in outer_start(outer)
        assert host.pids()[1] == host.init_pid
        assert lab.hosts["host1"].outer_pid(inner) is None
        os.kill(outer, signal.SIGKILL)
        assert process.wait(5) == -signal.SIGKILL
        assert host.outer_pid(inner) is None
    finally:
        process.kill()
        process.communicate()


def test_a_program_ends_when_its_popen_is_killed(lab):
    mark = f"98{os.getpid()}.5"
    process = lab.hosts["host1"].popen(["sleep", mark])
    wait_until(lambda: len(processes_with(f"sleep {mark}")) == 2)  # it, and the one that waits
    process.kill()
    process.wait(5)
    wait_until(lambda: not processes_with(f"sleep {mark}"))


def test_init_waits_for_orphans(lab):
    host = lab.hosts["host1"]
    host.run(["sh", "-c", "sleep 0.05 & sleep 0.05 & exit 0"])
    wait_until(lambda: list(host.pids()) == [1])
    state = Path(f"/proc/{host.init_pid}/task/{host.init_pid}/children")
    wait_until(lambda: not state.read_text().split())


def test_a_killed_host_takes_all_of_its_processes_and_says_so():
    with Lab.up(a_lab("hosts: 2")) as lab:
        victim, other = lab.hosts["host0"], lab.hosts["host1"]
        mark = f"97{os.getpid()}.5"
        process = victim.popen(["sh", "-c", f"setsid sleep {mark} & sleep {mark}"])
        wait_until(lambda: len(processes_with(f"sleep {mark}")) >= 3)
        start_s = time.monotonic()
        victim.kill()
        assert process.wait(5) == -signal.SIGKILL
        wait_until(lambda: not processes_with(f"sleep {mark}"))
        assert time.monotonic() - start_s < 1.0
        assert not victim.is_alive
        for use in (
            lambda: victim.run(["true"]),
            lambda: lab.net(victim.network, "ip", "addr"),
            lambda: lab.links["host0"].set_rate(10, "a_to_b"),
        ):
            with pytest.raises(LabError, match="host0 is dead"):
                use()
        victim.kill()  # twice is no error
        assert other.run(["hostname"]).stdout == "host1\n"


def test_what_a_tool_says_is_in_the_error(lab):
    with pytest.raises(LabError, match=r"star: ip link show dev none: .*does not exist"):
        lab.net(lab.networks["star"], "ip", "link", "show", "dev", "none")
