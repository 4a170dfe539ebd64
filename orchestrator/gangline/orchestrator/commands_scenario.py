"""`gangline lab run`: play a scenario on a lab of its own, and say what did not go as expected."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from gangline.orchestrator import api
from gangline.orchestrator.commands_options import Common
from gangline.orchestrator.display import duration
from gangline.orchestrator.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from gangline.orchestrator.timeline import Timeline

# What stays in the folder of a scenario that went as expected.
_RESULTS = frozenset(["scenario.yaml", "timeline.json", "timeline.svg", "timeline.png"])


def run(
    scenario: Annotated[Path, Parameter(help="The scenario (docs/lab.md, examples/scenarios).")],
    /,
    *,
    out: Annotated[
        Path | None,
        Parameter(help="Folder for what it leaves; otherwise a new one in RUNS/lab."),
    ] = None,
    keep: Annotated[
        bool, Parameter(help="Keep the runs' folders and logs also when all went as expected.")
    ] = False,
    without_faults: Annotated[
        bool, Parameter(help="Leave the faults out: a good scenario must then fail.")
    ] = False,
    overrides: Annotated[
        tuple[str, ...],
        Parameter(
            name="--set",
            help="Set a field of the scenario file, e.g. --set timeout_s=60; may be repeated.",
        ),
    ] = (),
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Run a job on a lab of its own while things go wrong, and judge what came of it.

    Needs root. Ends with 0 when all went as expected, else with 7 and a line per expectation that
    did not hold. Leaves timeline.json, timeline.svg and timeline.png.
    """
    from gangline.orchestrator.runs import new_run_id
    from gangline.orchestrator.scenario import load_scenario
    from gangline.orchestrator.scenario_run import run_scenario

    loaded = load_scenario(scenario, overrides)
    root = (common.runs or api.DEFAULT_RUNS).absolute() / "lab"
    folder = out.absolute() if out else root / new_run_id(loaded.file.name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--out {folder} is not an empty folder; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(scenario, folder / "scenario.yaml")
    timeline = run_scenario(loaded, out=folder, without_faults=without_faults, note=common.note)
    if not timeline.failures and not keep:
        _remove_all_but_results(folder)
    if common.json:
        common.data_json(_as_json(timeline, folder))
    else:
        for line in _lines(timeline, folder):
            common.data(line)
    return ExitCode.UNEXPECTED if timeline.failures else ExitCode.OK


def _remove_all_but_results(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name in _RESULTS:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _lines(timeline: Timeline, folder: Path) -> list[str]:
    spent = timeline.durations_s
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent.items())
    verdict = "not as expected" if timeline.failures else "as expected"
    lines = [
        f"{timeline.scenario}: expected {failure['expectation']} {failure['expected']}, "
        f"found {failure['found']}"
        for failure in timeline.failures
    ]
    return [*lines, f"{timeline.scenario}: {verdict} ({times}); see {folder / 'timeline.png'}"]


def _as_json(timeline: Timeline, folder: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "scenario": timeline.scenario,
        "as_expected": not timeline.failures,
        "failures": timeline.failures,
        "state": timeline.state,
        "reason": timeline.reason,
        "exit_code": timeline.exit_code,
        "faults": [
            {"label": fault.label, "target": fault.target, "doubt": fault.doubt}
            for fault in timeline.faults
        ],
        "durations_s": timeline.durations_s,
        "out": str(folder),
    }
