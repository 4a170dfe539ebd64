"""Ray across the hosts of a lab: a job on all of them, the token, and the loss of a host."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gangline.orchestrator import lab_ray
from gangline.orchestrator.errors import LabError
from gangline.orchestrator.lab import Lab, in_network
from gangline.orchestrator.lab_file import load_lab

from .lab_tools import needs_lab, nothing_left_behind

pytestmark = [*needs_lab, pytest.mark.ray]

LAB = "hosts: 3\nray: {cpus_per_host: 1}\n"
# What another process may take longer by, on a busy machine.
MAX_NOTICE_S = 5.0
JOB = """
kind: script
name: where
script: where_program.py
workers: {count: 3, cpus: 1}
tracking: {enabled: false}
"""


@pytest.fixture(scope="module")
def lab():
    with nothing_left_behind(), Lab.up(load_lab(LAB), log=print) as lab:
        yield lab


def test_ray_is_up_on_every_host(lab):
    ray = lab.ray
    assert set(ray.node_ids) == ray.alive_hosts() == {"host0", "host1", "host2"}
    assert len(set(ray.node_ids.values())) == 3
    pids = ray.raylet_pids()
    assert set(pids) == {"host0", "host1", "host2"}
    for name, pid in pids.items():
        assert pid in lab.hosts[name].pids().values()
        assert Path(f"/proc/{pid}/comm").read_text() == "raylet\n"
    assert ray.gcs_pid() in lab.hosts["host0"].pids().values()
    print(f"3 hosts with Ray were up in {lab.up_s:.1f} s")


def test_the_cluster_refuses_who_does_not_know_the_token(lab):
    import http.client

    with in_network(lab.hosts["host1"].network):
        connection = http.client.HTTPConnection(lab.hosts["host0"].ips[0], 8265, timeout=10)
        connection.request("GET", "/api/jobs/")
        assert connection.getresponse().status in (401, 403)
        connection.close()
    mode = lab.hosts["host0"].path(lab.ray.token_file).stat().st_mode
    assert mode & 0o077 == 0
    token = lab.hosts["host0"].path(lab.ray.token_file).read_text()
    assert token not in json.dumps(dict(lab.ray.environment))


def test_a_job_runs_across_the_hosts(lab, tmp_path):
    job = tmp_path / "where.yaml"
    job.write_text(JOB)
    script = Path(__file__).with_name("where_program.py")
    (tmp_path / script.name).write_text(script.read_text())
    gangline = [sys.executable, "-m", "gangline.orchestrator.cli"]
    command = [*gangline, "run", str(job), "--address", "auto", "--runs", str(tmp_path / "runs")]
    done = lab.hosts["host0"].run(command, cwd=tmp_path, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (places,) = (tmp_path / "runs").glob("where-*/artifacts/places")
    expected = sorted(f"{host.name} {host.ips[0]}" for host in lab.hosts.values())
    assert places.read_text().splitlines() == expected


def test_a_host_without_power_is_noticed_in_about_two_seconds(lab):
    """The last test: nothing says goodbye, so the head has to miss the host by itself."""
    victim = lab.hosts["host2"]
    raylet = lab.ray.raylet_pids()["host2"]
    waiter = subprocess.Popen(["tail", f"--pid={raylet}", "-f", "/dev/null"])
    start_s = time.monotonic()
    victim.power_off()
    waiter.wait(5)
    while lab.ray.alive_hosts() != {"host0", "host1"}:
        assert time.monotonic() - start_s < MAX_NOTICE_S, "the head still takes it for alive"
        time.sleep(0.02)
    print(f"noticed {time.monotonic() - start_s:.2f} s after the power was cut")
    with pytest.raises(LabError, match="host2 is dead"):
        victim.run(["true"])


def test_ray_that_cannot_start_is_one_line_with_rays_own_words(monkeypatch):
    monkeypatch.setattr(lab_ray, "_FOLDER", Path("/dev/shm") / ("too-long" * 10))
    wanted = r"^Ray could not start on host0 \(exit code \d+\): .*AF_UNIX path length.*$"
    lab = Lab.up(load_lab("hosts: 1\n"))
    with nothing_left_behind(), pytest.raises(LabError, match=wanted), lab:
        pass
