"""What a user does, with the real command on a real private Ray: run, lose a rank, stop, resume.

One run without a fault is the reference; every other run must end with its weights.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent.parent
TRAIN = ROOT / "examples" / "moe_text_small.yaml"
SCRIPT = ROOT / "examples" / "script_ddp.yaml"
NUM_STEPS = 150
STEPS = ["--set", f"training.steps={NUM_STEPS}"]
SCRIPT_STEPS = ["--set", "args=[--steps, 400, --save-every, 20]"]

Act = Callable[[dict, "Command"], None]


class Command:
    """A `gangline --json` command in a child process, with the records that it printed."""

    def __init__(self, folder: Path, *arguments: str | Path, act: Act | None = None) -> None:
        command = [sys.executable, "-m", "gangline.orchestrator.cli", "--json"]
        self.records: list[dict] = []
        self.harmed: list = []
        with open(folder / "stderr", "ab") as errors:
            self.process = subprocess.Popen(
                [*command, *map(str, arguments)],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.records.append(json.loads(line))
            if act is not None:
                act(self.records[-1], self)
        self.exit_code = self.process.wait()

    def events(self, name: str) -> list[dict]:
        return [r for r in self.records if r.get("event") == name]


def kill_rank_1_at(step: int) -> Act:
    def act(record: dict, command: Command) -> None:
        ready = record.get("type") == "progress" and record["state"] == "RUNNING"
        if ready and not command.harmed and (record["step"] >= step or record["kind"] == "script"):
            if record["kind"] == "script" and not saved_something(command):
                return
            (worker,) = [w for w in record["workers"] if w["rank"] == 1]
            os.kill(worker["pid"], signal.SIGKILL)
            command.harmed.append(worker["pid"])

    return act


def saved_something(command: Command) -> bool:
    return any("saved" in r.get("text", "") for r in command.records)


def only_run(folder: Path) -> Path:
    (found,) = [p.parent for p in folder.glob("runs/*/journal.jsonl")]
    return found


def weights(folder: Path) -> Any:
    lines = (only_run(folder) / "journal.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["result"]["weights_sha256"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a fault, beside which a script job runs on a second private Ray."""
    folder = tmp_path_factory.mktemp("reference")
    beside = tmp_path_factory.mktemp("beside")
    command = [sys.executable, "-m", "gangline.orchestrator.cli", "run", str(SCRIPT), *SCRIPT_STEPS]
    other = subprocess.Popen(command, cwd=beside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run = Command(folder, "run", TRAIN, *STEPS)
    assert run.exit_code == 0, (folder / "stderr").read_text()
    output, _ = other.communicate(timeout=120)
    assert other.returncode == 0, output.decode()
    (folder / "script_weights").write_text(script_weights(beside))
    return folder


def script_weights(folder: Path) -> Any:
    log = (only_run(folder) / "logs" / "rank-0.log").read_text()
    return re.findall(r"done: weights (\w+)", log)[-1]


def test_training_survives_kill_9_with_the_weights_of_the_run_without_it(
    tmp_path: Path, reference: Path
) -> None:
    run = Command(tmp_path, "run", TRAIN, *STEPS, act=kill_rank_1_at(20))
    assert run.exit_code == 0, (tmp_path / "stderr").read_text()
    assert not psutil.pid_exists(run.harmed[0])
    assert [d["action"] for d in run.events("decision")] == ["replace"]
    (recovered,) = run.events("recovered")
    assert recovered["resumed_step"] >= 5, "progress was made and kept"
    assert weights(tmp_path) == weights(reference)
    check_mlflow(tmp_path, num_attempts=2)


def check_mlflow(folder: Path, num_attempts: int) -> None:
    """One parent run with each step once, one child per attempt, and the artifacts."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "gangline"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert len(runs) == 1 + num_attempts
    assert parent.info.status == "FINISHED"
    history = client.get_metric_history(parent.info.run_id, "train/loss")
    assert Counter(m.step for m in history) == dict.fromkeys(range(1, NUM_STEPS + 1), 1)
    for name in ("train/tokens_per_s", "train/flops_per_s", "train/grad_norm", "eval/loss"):
        assert name in parent.data.metrics
    for name in ("moe/expert_load_max_over_mean", "moe/expert_entropy", "checkpoint/commit_s"):
        assert name in parent.data.metrics
    assert any(name.startswith("system/") for name in parent.data.metrics)
    artifacts = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert {"job.yaml", "logs", "artifacts", "checkpoints"} <= artifacts
    assert parent.inputs is not None
    assert parent.inputs.dataset_inputs[0].dataset.digest


def test_a_stopped_run_resumes_where_it_was(tmp_path: Path, reference: Path) -> None:
    def stop(record: dict, command: Command) -> None:
        if record.get("type") == "progress" and record["step"] >= 20 and not command.harmed:
            command.process.send_signal(signal.SIGINT)
            command.harmed.append(record["step"])

    stopped = Command(tmp_path, "run", TRAIN, *STEPS, act=stop)
    assert stopped.exit_code == 130
    resumed = Command(tmp_path, "resume", "@last")
    assert resumed.exit_code == 0, (tmp_path / "stderr").read_text()
    (first,) = resumed.events("generation_started")
    assert first["generation"] >= 1
    steps = sorted((only_run(tmp_path) / "steps").iterdir())
    again = json.loads(steps[-1].read_text().splitlines()[0])["step"]
    assert again > 5, "it did not begin anew"
    assert weights(tmp_path) == weights(reference)


def test_a_users_script_survives_a_killed_rank(tmp_path: Path, reference: Path) -> None:
    run = Command(tmp_path, "run", SCRIPT, *SCRIPT_STEPS, act=kill_rank_1_at(0))
    assert run.exit_code == 0, (tmp_path / "stderr").read_text()
    assert run.harmed
    assert not psutil.pid_exists(run.harmed[0])
    assert len(run.events("generation_started")) == 2
    log = (only_run(tmp_path) / "logs" / "rank-0.log").read_text()
    starts = [int(step) for step in re.findall(r"starting at step (\d+)", log)]
    assert starts[0] == 0
    assert starts[-1] > 0, "the script went on from its own checkpoint"
    assert script_weights(tmp_path) == (reference / "script_weights").read_text()


def test_a_finished_run_makes_up_text(reference: Path) -> None:
    """The same seed gives the same text, and a wrong number is refused in one line."""

    def generate(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gangline.orchestrator.cli", "--json", "generate", "@last"]
        return subprocess.run(
            [*command, *options], cwd=reference, capture_output=True, text=True, timeout=120
        )

    first, again = (generate("--prompt", "def ", "--max-tokens", "40") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    said = json.loads(first.stdout)
    assert (said["prompt"], said["seed"], said["step"]) == ("def ", 0, NUM_STEPS)
    assert 0 < len(said["text"]) <= 40
    refused = generate("--temperature", "-1")
    assert refused.returncode == 2
    assert "--temperature -1" in refused.stderr.splitlines()[-1]
