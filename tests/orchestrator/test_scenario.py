"""The scenario file: what is accepted, and that every fault of it is one clear line."""

import random
from pathlib import Path
from typing import Any

import pytest

from gangline.orchestrator.errors import UsageError
from gangline.orchestrator.faults import FAULT_KINDS
from gangline.orchestrator.job_errors import JobFileError
from gangline.orchestrator.scenario import load_scenario

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SHIPPED = sorted((EXAMPLES / "scenarios").glob("*.yaml"))

GOOD = """
lab: {hosts: 2, ray: {cpus_per_host: 1}}
job: {kind: train, workers: {count: 2}, tracking: {enabled: false}}
faults:
  - {kind: kill_worker, rank: 1, at_step: 3}
expect: {actions: [restart]}
"""


def written(folder: Path, text: str) -> Path:
    (folder / "it.py").touch()
    path = folder / "a_scenario.yaml"
    path.write_text(text)
    return path


def problems_of(folder: Path, text: str) -> list[Any]:
    with pytest.raises(JobFileError) as caught:
        load_scenario(written(folder, text))
    return caught.value.problems


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_file_is_loaded_with_its_lab_and_job(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, GOOD))
    assert scenario.file.name == "a_scenario", "the file's name where it has none"
    assert scenario.lab.host_names == ("host0", "host1")
    assert scenario.job.workers.count == 2
    assert scenario.labels == ["kill_worker"]
    assert not scenario.needs_twin


def test_lab_and_job_may_be_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("hosts: 2\nray: {cpus_per_host: 1}\n")
    (tmp_path / "job.yaml").write_text("kind: train\nworkers: {count: 2}\n")
    text = "lab: two.yaml\njob: job.yaml\nset: [training.steps=7]\n"
    scenario = load_scenario(written(tmp_path, text), ["timeout_s=9"])
    assert scenario.lab.host_names == ("host0", "host1")
    assert scenario.job.kind == "train"
    assert scenario.job.training.steps == 7
    assert scenario.file.timeout_s == 9


def test_there_are_at_least_ten_and_they_load() -> None:
    assert len(SHIPPED) >= 10


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_scenario_is_good_and_says_what_it_shows(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.file.name == path.stem.replace("_", "-")
    assert len(scenario.file.description) > 60
    assert scenario.file.faults
    assert scenario.file.expect.model_fields_set


def test_the_shipped_scenarios_cover_the_kinds_of_faults() -> None:
    used = {fault.kind for path in SHIPPED for fault in load_scenario(path).file.faults}
    # What these two do is covered by spine_down and blackhole in tests of the lab.
    assert set(FAULT_KINDS) - used <= {"spine_black"}


WRONG = [
    (changed("rank: 1", "rank: 2"), "faults[0].rank", "0 to 1, or away"),
    (changed("rank: 1", "rank: far"), "faults[0].rank", "away"),
    (changed("kill_worker", "kil_worker"), "faults[0]", "did you mean kill_worker?"),
    (changed("at_step: 3", "at_step: 0"), "faults[0].at_step", "raise it to at least 1"),
    (changed("at_step: 3", "at_step: 3, at_s: 1"), "faults[0]", "give one of at_step, at_s"),
    (changed(", at_step: 3", ""), "faults[0]", "this one has none"),
    (changed("at_step: 3", "at_step: 3, for_s: 1"), "faults[0].for_s", "not known here"),
    (
        changed("kill_worker, rank: 1", "link_down, link: host2"),
        "faults[0].link",
        "one of host0, host1",
    ),
    (
        changed("kill_worker, rank: 1", "link_down, link: host1, rank: 0"),
        "faults[0]",
        "either link or rank",
    ),
    (changed("kill_worker, rank: 1", "kill_host"), "faults[0]", "either host or rank"),
    (
        changed("kill_worker, rank: 1", "spine_down, spine: spine0"),
        "faults[0].spine",
        "there is none",
    ),
    (changed("kill_worker, rank: 1", "mlflow_down"), "faults[0]", "set mlflow_host"),
    (changed("hosts: 2", "hosts: 0"), "lab.hosts", "from 1 to 64"),
    (changed("hosts: 2", "hosts: 1"), "job", "raise lab.ray.cpus_per_host"),
    (changed("cpus_per_host: 1", "enabled: false"), "lab", "jobs need Ray"),
    (changed("count: 2", "count: two"), "job.workers.count", "a whole number"),
    (changed("kind: train", "kind: trian"), "job.kind", "did you mean train?"),
    (GOOD + "on_scratch: true\n", "job", "at most the 1 that host0 can hold"),
    (
        GOOD.replace("kind: train", "kind: script, script: it.py, working_dir: .")
        .replace("at_step: 3", "at_s: 3")
        .replace(", tracking: {enabled: false}", ""),
        "faults[0]",
        "give from_start_s instead",
    ),
    (changed("kind: train", "kind: train, cluster: {}"), "job.cluster", "the lab decides"),
    (changed("[restart]", "[reboot]"), "expect.actions[0]", "replace, restart"),
    (changed("actions: [restart]", "state: DONE"), "expect.state", "SUCCEEDED"),
    (changed("actions: [restart]", "stat: FAILED"), "expect.stat", "did you mean state?"),
    (
        changed("actions: [restart]", "step_time: [{fault: slow_link}]"),
        "expect.step_time[0].fault",
        "one of kill_worker",
    ),
    (
        changed("actions: [restart]", "traffic: [{link: host9}]"),
        "expect.traffic[0].link",
        "one of host0, host1",
    ),
    (changed("actions: [restart]", "samples: each_once"), "expect.samples", "sample_ledger"),
    (changed("actions: [restart]", "metrics: {}"), "expect.metrics", "set mlflow_host"),
    (changed("actions: [restart]", "resumed: {}"), "expect.resumed", "set resume: true"),
    (changed("lab:", "labs:"), "labs", "did you mean lab?"),
    ("", "", "nothing"),
    ("[1, 2]", "", "a mapping"),
    ("lab: {hosts: 2", "", "YAML"),
    (GOOD + "mlflow_host: host7\n", "mlflow_host", "one of host0, host1"),
]


@pytest.mark.parametrize(("text", "path", "said"), WRONG, ids=[f"{w[1]}-{w[2]}" for w in WRONG])
def test_what_is_wrong_is_one_line_with_its_place_and_mend(
    tmp_path: Path, text: str, path: str, said: str
) -> None:
    problems = problems_of(tmp_path, text)
    mine = [problem for problem in problems if problem.path.startswith(path)]
    assert mine, [problem.render() for problem in problems]
    line = mine[0].render("a.yaml")
    assert said in line
    assert "\n" not in line
    assert mine[0].mend
    if path:
        assert mine[0].line is not None, "the place in the file"


def test_all_faults_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    text = changed("kill_worker", "kil_worker").replace("hosts: 2", "hsts: 2")
    problems = problems_of(tmp_path, text.replace("[restart]", "[reboot]"))
    assert {p.path for p in problems} >= {"lab.hsts", "faults[0]", "expect.actions[0]"}


def test_a_problem_of_the_inline_job_is_placed_in_the_scenario(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, changed("count: 2", "count: 0"))
    assert problem.path == "job.workers.count"
    assert problem.line == 3


def test_a_problem_of_a_named_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("hosts: nil\n")
    with pytest.raises(JobFileError, match=r"two\.yaml:1:8: hosts"):
        load_scenario(written(tmp_path, "lab: two.yaml\njob: job.yaml\n"))
    with pytest.raises(JobFileError, match=r"missing\.yaml: found no file"):
        load_scenario(written(tmp_path, "lab: missing.yaml\njob: job.yaml\n"))


def test_hostile_bytes_end_in_lines_never_in_a_traceback(tmp_path: Path) -> None:
    random_bytes = random.Random(3)
    good = SHIPPED[0].read_bytes()
    for _ in range(150):
        text = bytearray(good)
        for _ in range(random_bytes.randrange(1, 8)):
            place = random_bytes.randrange(len(text))
            if random_bytes.random() < 0.5:
                text[place] = random_bytes.randrange(256)
            else:
                del text[place : place + random_bytes.randrange(1, 30)]
        path = tmp_path / "hostile.yaml"
        path.write_bytes(text)
        lines = refusal_of(path)
        assert all(line and line.isprintable() for line in lines)


def refusal_of(path: Path) -> list[str]:
    """The lines with which a file is refused; [] if it is still good. No other error is let by."""
    try:
        load_scenario(path)
    except UsageError as error:
        return str(error).splitlines() or [""]
    return []


def test_a_huge_file_and_deep_nesting_are_refused(tmp_path: Path) -> None:
    for text in ("a: " + "x" * 300_000, "[" * 3000, "faults: [" + "{}, " * 5000 + "]"):
        assert problems_of(tmp_path, text)
