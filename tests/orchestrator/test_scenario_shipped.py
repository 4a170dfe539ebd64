"""The shipped scenarios: each is shown to fail without its fault.

A few run end to end in every test run, the others nightly, all with `gangline lab run`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gangline.orchestrator.errors import ExitCode
from gangline.orchestrator.expectations import Expect
from gangline.orchestrator.scenario import Scenario, load_scenario, spine_names
from gangline.orchestrator.scenario_judge import judge
from gangline.orchestrator.timeline import FaultRecord, Timeline

from . import scenario_timelines as made
from .lab_tools import needs_lab, processes_with

SHIPPED = sorted((Path(__file__).parents[2] / "examples" / "scenarios").glob("*.yaml"))
IN_EVERY_RUN = ("disk_full", "spine_down", "worker_killed")
# The twin of the weights would cost another run: its comparison is for the nights.
IN_A_HURRY = ["--set", "expect.weights=null"]


def cases(*, nightly: bool) -> list[Any]:
    chosen = [path for path in SHIPPED if nightly or path.stem in IN_EVERY_RUN]
    marks = [*needs_lab, pytest.mark.ray, pytest.mark.timeout(600)]
    marks += [pytest.mark.nightly] if nightly else []
    return [pytest.param(path, id=path.stem, marks=marks) for path in chosen]


def without_its_faults(scenario: Scenario) -> Timeline:
    """A run to which nothing happened, with the times at which something should have."""
    timeline = made.undisturbed()
    timeline.hosts = list(scenario.lab.host_names)
    for fault, label in zip(scenario.file.faults, scenario.labels, strict=True):
        lasts = "for_s" in type(fault).model_fields
        begun_at = made.START + 6.0
        record = FaultRecord(label, fault.kind, "", 1, "host1", begun_at=begun_at, lasts=lasts)
        record.is_left_out = True
        record.ended_at = begun_at + 2.0 if getattr(fault, "for_s", None) else None
        record.links = ["leaf0-spine0", "leaf1-spine0"] if spine_names(scenario.lab) else ["host1"]
        timeline.faults.append(record)
    for leaf in (0, 1):
        timeline.links[f"leaf{leaf}-spine0"] = made.link_series(9.0)
        timeline.links[f"leaf{leaf}-spine1"] = made.link_series(9.0, rate_bytes_s=100.0)
    timeline.twin = {"state": "SUCCEEDED", "weights_sha256": timeline.weights_sha256}
    timeline.samples = {"num_expected": 1, "num_taken": 1, "num_missing": 0, "num_repeated": 0}
    timeline.metrics = {"down_s": 0.0, "num_expected": 1, "num_missing": 0, "num_doubled": 0}
    timeline.resumed = {"state": "SUCCEEDED", "reason": "", "from_step": None}
    return timeline


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_a_scenario_expects_is_not_true_without_its_fault(path: Path) -> None:
    scenario = load_scenario(path)
    findings = judge(scenario.file.expect, without_its_faults(scenario))
    wrong = [finding for finding in findings if not finding.expectation.startswith("fault ")]
    assert wrong, "nothing that it expects depends on the fault"
    assert judge(Expect(), made.undisturbed()) == [], "the run itself was good"


def lab_run(path: Path, out: Path, *options: str) -> dict[str, Any]:
    """What `gangline lab run --json` printed, and its exit code."""
    command = [sys.executable, "-m", "gangline.orchestrator.cli", "lab", "run", str(path)]
    command += ["--out", str(out), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode in (ExitCode.OK, ExitCode.UNEXPECTED), done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    print(path.stem, result["durations_s"], result["failures"])
    return {**result, "code": done.returncode}


def check_passes(path: Path, out: Path, *options: str) -> None:
    result = lab_run(path, out, *options)
    assert result["failures"] == []
    assert result["code"] == ExitCode.OK
    assert all(fault["doubt"] == "" for fault in result["faults"])
    names = sorted(file.name for file in out.iterdir())
    assert names == ["scenario.yaml", "timeline.json", "timeline.png", "timeline.svg"]


@pytest.mark.parametrize("path", cases(nightly=False))
def test_a_shipped_scenario_goes_as_expected(path: Path, tmp_path: Path) -> None:
    check_passes(path, tmp_path / "out", *IN_A_HURRY)


@pytest.mark.parametrize("path", cases(nightly=True))
def test_a_shipped_scenario_goes_as_expected_and_fails_without_its_fault(
    path: Path, tmp_path: Path
) -> None:
    check_passes(path, tmp_path / "with")
    result = lab_run(path, tmp_path / "without", "--without-faults", *IN_A_HURRY)
    assert result["code"] == ExitCode.UNEXPECTED
    wrong = {failure["expectation"] for failure in result["failures"]}
    assert any(not expectation.startswith("fault ") for expectation in wrong), wrong
    assert {fault["doubt"] for fault in result["faults"]} <= {"it was left out"}
    assert (tmp_path / "without" / "runs").is_dir() or "disk_full" in path.stem, "kept, to look at"


SLOW_LINK = SHIPPED[0].with_name("slow_link.yaml")


def a_night(test: Any) -> Any:
    for mark in (*needs_lab, pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(300)):
        test = mark(test)
    return test


def processes_of(out: Path) -> dict[int, str]:
    """What still runs of a scenario some seconds after its end."""
    deadline_s = time.monotonic() + 10
    while (found := processes_with(str(out))) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return found


@a_night
def test_a_run_that_takes_too_long_is_ended_and_judged(tmp_path: Path) -> None:
    result = lab_run(SLOW_LINK, tmp_path / "out", "--set", "timeout_s=2")
    assert result["code"] == ExitCode.UNEXPECTED
    assert result["exit_code"] is None
    wrong = {failure["expectation"] for failure in result["failures"]}
    assert {"timeout_s", "fault slow_link"} <= wrong
    assert processes_of(tmp_path / "out") == {}


@a_night
def test_killing_the_command_ends_everything_it_started(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gangline.orchestrator.cli", "lab", "run", str(SLOW_LINK)]
    process = subprocess.Popen([*command, "--out", str(out), "--quiet"])
    deadline_s = time.monotonic() + 120
    while not list(out.glob("runs/*/steps/*.jsonl")) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    during = processes_with(str(out))
    process.kill()
    process.wait()
    assert len(during) >= 3, "the command, the run, its driver"
    assert processes_of(out) == {}
