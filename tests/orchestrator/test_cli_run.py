"""`gangline run` with a real driver on a private Ray: killed, interrupted, resumed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .ticking import Shell, ticks_in

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that has to do with a run below `folder`, and its private Ray."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words = " ".join(process.info["cmdline"] or [])
        variables = (process.info["environ"] or {}).get("GANGLINE_RUN_DIR", "")
        if process.pid != os.getpid() and (str(folder) in words or str(folder) in variables):
            found.append(process)
    return found


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path, {})
    yield made
    made.close()


def test_a_run_that_is_killed_and_one_that_is_interrupted_go_on(
    shell: Shell, tmp_path: Path
) -> None:
    shell.write_job(num_ticks=100_000)

    running, run_id = shell.started("run", "ticks.yaml")
    shell.ticks_of(run_id)
    shell.until(run_id, "RUNNING")
    shell("resume", run_id, code=1)
    assert processes_of(tmp_path)
    # Without the command the driver would cancel the job in peace; neither gets the chance.
    (driver,) = psutil.Process(running.pid).children()
    driver.suspend()
    running.kill()
    driver.kill()
    running.communicate()
    (listed,) = shell.json("ls")["jobs"]
    assert listed["state"] == "FAILED"
    assert f"driver process {running.pid} is gone" in listed["reason"]
    deadline_s = time.monotonic() + 30.0
    while left := processes_of(tmp_path):
        assert time.monotonic() < deadline_s, left  # nothing may outlive the one who started it
        time.sleep(0.2)

    num_ticks = shell.ticks_of(run_id)
    running, same_id = shell.started("resume", run_id)
    assert same_id == run_id
    num_ticks = shell.ticks_of(run_id, more_than=num_ticks)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "stopping at the next safe point" in err
    assert out.splitlines()[-1].startswith('{"type": "result"')
    assert shell.json("show", run_id)["state"] == "CANCELLED"

    num_ticks = shell.ticks_of(run_id)
    out = shell("resume", run_id, "--set", f"args=[{num_ticks + 5}]")
    assert out.startswith(f"{run_id}  SUCCEEDED")
    assert "[rank 0] bye" in shell.err  # the lines of a script are shown as it runs
    assert ticks_in(shell("logs", run_id, "--rank", "0")) == list(range(num_ticks + 5))


def test_a_run_is_cancelled_from_another_process(shell: Shell) -> None:
    shell.write_job(num_ticks=100_000)
    running, run_id = shell.started("run", "ticks.yaml")
    shell.ticks_of(run_id)
    shell("cancel", "ticks", "--grace", "30")
    running.communicate(timeout=60)
    assert running.returncode == 103
    assert "CANCELLED" in shell("wait", run_id, code=103)
