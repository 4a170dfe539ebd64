"""The command line against a real Ray cluster of three nodes with token auth.

Every command is a process of its own, as it is for a user; nothing is shared but the cluster and
the runs folder. One test takes the run folder out of sight, as on a cluster without a shared disk.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gangline.orchestrator.history import History

from .ray_nodes import RayNodes, free_ports
from .ticking import CANARY, Shell, ticks_in

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    cluster = RayNodes(3, cpus_per_node=1)
    yield cluster
    cluster.close()


class ClusterShell(Shell):
    """A shell that knows the cluster."""

    def __init__(self, folder: Path, nodes: RayNodes) -> None:
        super().__init__(folder, nodes.environment)
        self.nodes = nodes


@pytest.fixture
def shell(tmp_path: Path, nodes: RayNodes) -> Iterator[ClusterShell]:
    made = ClusterShell(tmp_path, nodes)
    yield made
    made.close()


def a_line_of_error(shell: ClusterShell) -> str:
    (line,) = shell.err.splitlines()
    assert line.startswith("gangline: ")
    assert shell.nodes.token not in line
    return line


def test_what_cannot_be_submitted_is_one_line_and_its_exit_code(shell: ClusterShell) -> None:
    for token, words in (("", "token missing"), ("wrong", "token refused")):
        shell.environment["RAY_AUTH_TOKEN"] = token
        shell.environment["HOME"] = str(shell.folder)  # no ~/.ray/auth_token
        shell("submit", "ticks.yaml", code=4)
        assert words in a_line_of_error(shell)
    (shell.folder / "token").write_text(shell.nodes.token)
    shell("submit", "ticks.yaml", "--token-file", "token", "--set", "workers.count=9", code=5)
    assert "needs 9 workers" in a_line_of_error(shell)
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    shell("submit", "ticks.yaml", "--token-file", "token", "--address", dead, code=4)
    assert "cannot reach" in a_line_of_error(shell)
    del shell.environment["CANARY"]
    shell("submit", "ticks.yaml", "--token-file", "token", code=2)
    assert "env_from names CANARY" in a_line_of_error(shell)
    assert shell.json("ls")["jobs"] == []


def test_a_job_is_submitted_followed_and_waited_for(shell: ClusterShell) -> None:
    (shell.folder / "token").write_text(shell.nodes.token)
    del shell.environment["RAY_AUTH_TOKEN"]
    run_id = shell("submit", "ticks.yaml", "-d", "--token-file", "token").strip()
    (listed,) = shell.json("ls")["jobs"]
    assert (listed["run_id"], listed["mode"]) == (run_id, "submit")
    assert listed["state"] in ("QUEUED", "STARTING", "RUNNING")
    followed = shell("logs", "-f", "ticks").splitlines()
    for rank in (0, 1):
        ticks = [line for line in followed if line.startswith(f"[rank {rank}] tick")]
        assert ticks == [f"[rank {rank}] tick {number}" for number in range(40)]
    assert f"[rank 0] the variable has {len(CANARY)} characters" in followed
    assert "SUCCEEDED" in shell("wait", "@last")
    assert "finished" in shell("events", run_id)
    everywhere_but_the_package(shell)
    out_of_sight(shell, run_id)


def everywhere_but_the_package(shell: ClusterShell) -> None:
    """The value of a variable of env_from is in no listing and no file of the run."""
    from gangline.orchestrator.jobs_rest import JobsRest, Token

    jobs = JobsRest(shell.nodes.address, Token(shell.nodes.token, "the test")).jobs()
    assert jobs
    assert CANARY not in json.dumps(jobs)
    for path in (shell.folder / "runs").rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


def out_of_sight(shell: ClusterShell, run_id: str) -> None:
    """Where the run folder cannot be seen, the job is followed through the cluster."""
    with_folder = shell("logs", run_id)
    folder = shell.folder / "runs" / run_id
    folder.rename(shell.folder / "hidden")
    history = History(shell.folder / "runs")
    history.update(run_id, state="RUNNING")  # forget how it ended
    info = shell.json("show", run_id)
    assert (info["state"], info["generation"]) == ("SUCCEEDED", 0)  # told by the driver's records
    through_cluster = shell("logs", run_id)
    ranks = [line for line in through_cluster.splitlines() if line.startswith("[rank")]
    assert sorted(ranks) == sorted(with_folder.splitlines())
    assert "finished" in shell("events", run_id)
    shell("checkpoint", "ls", run_id, code=3)
    assert "is not here" in a_line_of_error(shell)


def test_ctrl_c_detaches_cancel_ends_and_resume_goes_on(shell: ClusterShell) -> None:
    shell.write_job(num_ticks=100_000)
    submitting, run_id = shell.started("submit", "ticks.yaml")
    shell.until(run_id, "RUNNING")
    shell.ticks_of(run_id)
    submitting.send_signal(signal.SIGINT)
    _, err = submitting.communicate(timeout=30)
    assert submitting.returncode == 130
    assert "still running" in err
    assert shell.json("show", run_id)["state"] == "RUNNING"
    shell("wait", run_id, "--timeout", "0.5", code=6)
    shell("cancel", run_id)
    assert "CANCELLED" in shell("wait", run_id, code=103)
    num_done = shell.ticks_of(run_id)
    resumed = ["resume", run_id, "-d", "--set", f"args=[{num_done + 10}]"]
    assert shell(*resumed).strip() == run_id
    assert "SUCCEEDED" in shell("wait", run_id)
    assert ticks_in(shell("logs", run_id, "--rank", "0")) == list(range(num_done + 10))
    assert shell.json("show", run_id)["submission_id"] == f"{run_id}-r2"
