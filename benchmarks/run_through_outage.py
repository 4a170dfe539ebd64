"""Does an MLflow server that dies or hangs in mid-run cost a training step, or a point?

    python benchmarks/run_through_outage.py --seconds 60

Trains the same job three times with `gangline run` and a real MLflow server on the loopback
device: undisturbed; with the server killed for a while; with the server hung (connections are
accepted and never answered). Compares the durations of the steps inside the window of the outage
with the same steps of the undisturbed run, and then every point in the server's database with the
steps that rank 0 wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tracking_outage import FaultProxy, MlflowServer

from gangline.monitoring.metrics import step_metrics
from gangline.orchestrator.train_program import step_log_path

JOB = """
kind: train
name: outage
model: {dim: 64, num_layers: 2, num_heads: 2, num_kv_heads: 1, ffn_dim: 128,
        moe: {every: 2, num_experts: 4, top_k: 2}}
data: {source: python-docs, seq_len: 128}
training: {batch_size: 16}
mesh: {expert_parallel: 2}
checkpoint: {every_steps: 100}
workers: {count: 2, cpus: 0.5}
"""


def train(folder: Path, uri: str, num_steps: int, outage: Callable[[], None] | None) -> list[dict]:
    """Run the job; start `outage` in a thread at a tenth of the steps; return the steps."""
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(JOB)
    command = [sys.executable, "-m", "gangline.orchestrator.cli", "run", "job.yaml", "--quiet"]
    command += ["--set", f"tracking.uri={uri}", "--set", f"training.steps={num_steps}"]
    process = subprocess.Popen(command, cwd=folder)
    started = None
    while process.poll() is None:
        time.sleep(0.1)
        if outage is not None and started is None and len(steps_of(folder)) > num_steps // 10:
            started = threading.Thread(target=outage)
            started.start()
    if started is not None:
        started.join()
    assert process.returncode == 0, f"gangline ended with {process.returncode}"
    return steps_of(folder)


def run_folder(folder: Path) -> Path:
    return next(folder.glob("runs/*/journal.jsonl")).parent


def steps_of(folder: Path) -> list[dict[str, Any]]:
    if not list(folder.glob("runs/*/journal.jsonl")):
        return []
    path = step_log_path(run_folder(folder), 0)
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return [line for line in lines if line["kind"] == "step"]


def sync(folder: Path, uri: str) -> None:
    """Deliver what is left, as a user would after the job."""
    run_id = run_folder(folder).name
    command = [sys.executable, "-m", "gangline.orchestrator.cli", "track", "sync", run_id]
    subprocess.run([*command, "--timeout", "120"], cwd=folder, check=True)


def stored_points(database: Path, run_id: str) -> Counter[tuple[str, int, float]]:
    """Return (key, step, value) of every point in the job's own (parent) run."""
    query = """
        select m.key, m.step, m.value from metrics m
        join tags job on job.run_uuid = m.run_uuid and job.key = 'gangline.run_id'
        left join tags up on up.run_uuid = m.run_uuid and up.key = 'mlflow.parentRunId'
        where job.value = ? and up.value is null
    """
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection:
        return Counter(connection.execute(query, (run_id,)).fetchall())


def count_points(database: Path, run_id: str, steps: list[dict[str, Any]]) -> dict[str, int]:
    """Compare the job's run in the store with the steps: expected, missing, doubled."""
    stored = stored_points(database, run_id)
    expected = {
        (key, step["step"], value)
        for step in steps
        for key, value in step_metrics(step).items()
        if key.startswith(("train/", "moe/"))
    }
    return {
        "expected": len(expected),
        "missing": len([point for point in expected if stored[point] == 0]),
        "doubled": len([point for point in expected if stored[point] > 1]),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    n = len(ordered)
    return {"n": n, "p50_ms": 1e3 * ordered[n // 2], "p99_ms": 1e3 * ordered[int(n * 0.99)]}


def p99_ratio_interval(
    a: list[float], b: list[float], block: int = 20, rounds: int = 1000
) -> list[float]:
    """95 % interval of p99(b) / p99(a) by resampling blocks of steps (neighbours are alike)."""
    rng = random.Random(0)

    def p99(values: list[float]) -> float:
        blocks = [values[i : i + block] for i in range(0, len(values), block)]
        drawn = [v for _ in blocks for v in rng.choice(blocks)]
        return sorted(drawn)[int(len(drawn) * 0.99)]

    ratios = sorted(p99(b) / p99(a) for _ in range(rounds))
    return [round(ratios[25], 3), round(ratios[974], 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "machine": {"num_cpus": os.cpu_count(), "platform": platform.platform()},
        "seconds": options.seconds,
        "rounds": [],
    }
    for number in range(options.rounds):
        # Interleaved: a slow minute of the machine does not fall on one variant alone.
        result["rounds"].append(run_round(options, number))
        print(json.dumps(result["rounds"][-1], indent=1), file=sys.stderr)
    print(json.dumps(result, indent=1))


def run_round(options: argparse.Namespace, number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="outage-") as scratch:
        folder = Path(scratch)
        server = MlflowServer(folder)
        server.start()
        proxy = FaultProxy(server.port)
        windows: dict[str, list[float]] = {}

        def killed() -> None:
            windows["killed"] = [time.time()]
            server.kill()
            time.sleep(options.seconds)
            windows["killed"].append(time.time())
            server.start()

        def hung() -> None:
            windows["hung"] = [time.time()]
            proxy.mode = "hang"
            time.sleep(options.seconds)
            windows["hung"].append(time.time())
            proxy.mode = "pass"

        report: dict[str, Any] = {"round": number}
        calm = train(folder / "calm", server.uri, options.steps, None)
        report["undisturbed"] = quantiles([step["step_s"] for step in calm])
        for name, uri, outage in (("killed", server.uri, killed), ("hung", proxy.uri, hung)):
            steps = train(folder / name, uri, options.steps, outage)
            first, last = windows[name]
            inside = [step for step in steps if first <= step["time"] <= last]
            assert len(inside) > 100, "the outage must fall into the run"
            numbers = {step["step"] for step in inside}
            same = [step["step_s"] for step in calm if step["step"] in numbers]
            during = [step["step_s"] for step in inside]
            sync(folder / name, uri)
            run_id = run_folder(folder / name).name
            report[name] = {
                "during": quantiles(during),
                "same_steps_undisturbed": quantiles(same),
                "p99_ratio_95": p99_ratio_interval(same, during),
                "points": count_points(server.database, run_id, steps),
                "faults": dict(proxy.num_faults) if name == "hung" else {},
            }
        proxy.close()
        server.kill()
        return report


if __name__ == "__main__":
    main()
