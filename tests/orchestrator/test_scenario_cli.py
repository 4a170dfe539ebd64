"""`gangline lab run` without a lab: what it prints, keeps and ends with."""

import json
from pathlib import Path
from typing import Any

import pytest

from gangline.orchestrator import cli, scenario_run
from gangline.orchestrator.errors import ExitCode, LabError
from gangline.orchestrator.timeline import Timeline

from . import scenario_timelines as made
from .test_scenario import GOOD


class Played:
    """Stands in for a lab: leaves what a run leaves, and fails as it is told."""

    def __init__(self) -> None:
        self.failures: list[dict[str, str]] = []
        self.error: Exception | None = None
        self.asked: dict[str, Any] = {}

    def __call__(self, scenario: Any, *, out: Path, without_faults: bool, note: Any) -> Timeline:
        self.asked = {"scenario": scenario, "without_faults": without_faults}
        if self.error is not None:
            raise self.error
        (out / "runs" / "a-run").mkdir(parents=True)
        for name in ("timeline.json", "timeline.svg", "timeline.png", "run.err"):
            (out / name).write_text("")
        timeline = made.killed()
        timeline.durations_s = {"lab_up": 9.4, "job": 12.0}
        timeline.failures = self.failures
        return timeline


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    played = Played()
    monkeypatch.setattr(scenario_run, "run_scenario", played)
    monkeypatch.chdir(tmp_path)
    Path("it.yaml").write_text(GOOD)
    return played


WRONG = {"expectation": "actions", "expected": "[replace]", "found": "[]"}


def test_a_good_run_is_one_line_and_leaves_the_timeline(played: Played, capsys: Any) -> None:
    assert cli.main(["lab", "run", "it.yaml", "--out", "kept"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "as expected (lab_up 9s, job 12s); see" in out
    assert sorted(path.name for path in Path("kept").iterdir()) == [
        "scenario.yaml",
        "timeline.json",
        "timeline.png",
        "timeline.svg",
    ]
    assert not played.asked["without_faults"]


def test_what_was_not_expected_is_a_line_each_and_everything_is_kept(
    played: Played, capsys: Any
) -> None:
    played.failures = [WRONG, {**WRONG, "expectation": "weights"}]
    assert cli.main(["lab", "run", "it.yaml", "--out", "kept"]) == ExitCode.UNEXPECTED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "made-up: expected actions [replace], found []"
    assert len(lines) == 3
    assert (Path("kept") / "runs" / "a-run").is_dir()


def test_keep_keeps_everything(played: Played) -> None:
    assert cli.main(["lab", "run", "it.yaml", "--out", "kept", "--keep"]) == ExitCode.OK
    assert (Path("kept") / "run.err").exists()


def test_json_is_one_object(played: Played, capsys: Any) -> None:
    played.failures = [WRONG]
    words = ["lab", "run", "it.yaml", "--json", "--without-faults", "--set", "timeout_s=7"]
    assert cli.main(words) == ExitCode.UNEXPECTED
    result = json.loads(capsys.readouterr().out)
    assert result["version"] == 1
    assert result["as_expected"] is False
    assert result["failures"] == [WRONG]
    assert result["faults"] == [{"label": "kill_worker", "target": "rank 1 on host1", "doubt": ""}]
    assert Path(result["out"]).parent == Path.cwd() / "runs" / "lab"
    assert played.asked["without_faults"]
    assert played.asked["scenario"].file.timeout_s == 7


@pytest.mark.parametrize(
    ("error", "code"),
    [(LabError("no lab here"), ExitCode.ERROR), (ValueError("x"), ExitCode.ERROR)],
)
def test_a_run_that_could_not_be_is_an_error_of_one_line(
    played: Played, capsys: Any, error: Exception, code: ExitCode
) -> None:
    played.error = error
    assert cli.main(["lab", "run", "it.yaml"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_wrong_file_or_a_full_folder_is_a_usage_error(played: Played, capsys: Any) -> None:
    Path("wrong.yaml").write_text(GOOD.replace("kill_worker", "kil_worker"))
    assert cli.main(["lab", "run", "wrong.yaml"]) == ExitCode.USAGE
    assert "did you mean kill_worker?" in capsys.readouterr().err
    Path("full").mkdir()
    Path("full/file").write_text("")
    assert cli.main(["lab", "run", "it.yaml", "--out", "full"]) == ExitCode.USAGE
    assert "not an empty folder" in capsys.readouterr().err
    assert not played.asked
