"""The program of a bench job, without Ray: its files, its figures, how it fails and stops."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gangline.monitoring.comm_bench_config import CommBenchConfig
from gangline.monitoring.nccl_tests import parse_reports
from gangline.monitoring.nccl_tests_run import NcclTestsError
from gangline.orchestrator import bench_comm
from gangline.orchestrator.bench_files import json_path, table_path
from gangline.orchestrator.bench_program import BenchFailedError, BenchProgram, BenchProgramSpec
from gangline.orchestrator.errors import GanglineError
from gangline.orchestrator.step_tail import StepTail
from gangline.orchestrator.worker import Assignment, Control

HERE = Path(__file__).parent
SAMPLES = HERE.parent / "monitoring" / "nccl_tests_output"
SMALL: dict[str, Any] = {"min_bytes": 64, "max_bytes": 4096, "step_factor": 8, "iters": 2}


def program(run_dir: Path, **config: Any) -> BenchProgram:
    (run_dir / "artifacts").mkdir(exist_ok=True)
    made = BenchProgram(
        BenchProgramSpec(CommBenchConfig(**{**SMALL, **config}), run_dir, 30.0, num_gpus=0)
    )
    made.warm(made.prepare())
    return made


def alone(rank: int = 0, world_size: int = 1) -> Assignment:
    return Assignment(0, rank, world_size, "127.0.0.1", 0)


def test_rank_0_leaves_tables_json_and_figures(tmp_path: Path, capsys: Any) -> None:
    control = Control()
    made = program(tmp_path, operations=["all_reduce", "sendrecv"])
    assert made.run(alone(), control) == {"stopped": False, "step": 6}
    text = table_path(tmp_path).read_text()
    assert [report.operation for report in parse_reports(text)] == ["all_reduce", "sendrecv"]
    assert text in capsys.readouterr().out, "the rank's log has it, too"
    assert [len(one["results"]) for one in json.loads(json_path(tmp_path).read_text())] == [3, 3]
    lines = StepTail(tmp_path, 0).read()
    assert [(line["kind"], line["step"]) for line in lines[:3]] == [
        ("bench", 64), ("bench", 512), ("bench", 4096),
    ]  # fmt: skip
    assert "bench/sendrecv/out_of_place/time_us" not in lines[3]["values"]
    assert "bench/sendrecv/out_of_place/busbw_gbs" in lines[3]["values"]


def test_too_slow_is_a_failure_and_the_table_is_there(tmp_path: Path) -> None:
    made = program(tmp_path, min_busbw_gbs=5.0)
    with pytest.raises(BenchFailedError, match=r"wanted at least 4.5 .*see artifacts/bench.txt"):
        made.run(alone(), Control())
    assert "FAILED" in table_path(tmp_path).read_text()
    assert json.loads(json_path(tmp_path).read_text())["results"]


def test_a_stop_ends_after_the_row_that_is_under_way(tmp_path: Path) -> None:
    control = Control()
    control.should_stop.set()
    made = program(tmp_path, run_cycles=0, operations=["all_reduce", "reduce"])
    assert made.run(alone(), control) == {"stopped": True, "step": 0}
    (report,) = parse_reports(table_path(tmp_path).read_text())
    assert report.is_complete
    assert report.rows == []


@pytest.fixture
def binaries(tmp_path: Path) -> Path:
    folder = tmp_path / "build"
    folder.mkdir()
    source = (HERE.parent / "monitoring" / "fake_nccl_tests.py").read_text().splitlines()
    script = folder / "all_reduce_perf"
    script.write_text("\n".join([f"#!{sys.executable}", *source[1:]]) + "\n")
    script.chmod(0o755)
    behaviour = {
        "flags": ["-g", "-b", "-e", "-f", "-n", "-w", "-J"],
        "sample": str(SAMPLES / "v2.18.5-all_reduce.txt"),
        "json": str(SAMPLES / "v2.19.6-schema-3.json"),
    }
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    return folder


def test_every_worker_runs_the_binaries_on_its_own_gpus(tmp_path: Path, binaries: Path) -> None:
    config = {"implementation": "nccl-tests", "binaries": str(binaries)}
    with pytest.raises(BenchFailedError, match="wrong values in 1 measurements"):
        program(tmp_path, **config).run(alone(1, 2), Control())
    assert table_path(tmp_path, 1).name == "bench-rank-1.txt"
    assert table_path(tmp_path, 1).read_text() == (SAMPLES / "v2.18.5-all_reduce.txt").read_text()
    kept = json_path(tmp_path, 1).read_text()
    assert "hunter2" not in kept
    assert json.loads(kept)["version"] == 3


def test_a_binary_that_is_not_there_fails_before_a_group_is_made(
    tmp_path: Path, binaries: Path
) -> None:
    config = {"implementation": "nccl-tests", "binaries": str(binaries), "operations": ["gather"]}
    with pytest.raises(NcclTestsError, match="gather_perf is not in"):
        program(tmp_path, **config)


class Info:
    """A job that ended."""

    def __init__(self, run_dir: Path, state: str, reason: str) -> None:
        self.run_dir, self.state, self.reason = str(run_dir), state, reason
        self.run_id = run_dir.name


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED"])
def test_a_bench_on_ray_shows_the_table_as_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    reason = (
        "rank 0 on n raised an error (gangline.orchestrator.bench_program.BenchFailedError: "
        "all_reduce: average bus bandwidth 1 GB/s, wanted at least 9; see artifacts/bench.txt); "
        "its last lines: # | #. faults.max_failures allows no failure and this was number 1"
    )
    jobs = []

    def run(file: Path, *, address: str, runs: Path, watcher: Any) -> Info:
        jobs.append(json.loads(file.read_text()))
        (tmp_path / "artifacts").mkdir()
        info = Info(tmp_path, state, reason)
        watcher.on_start(info)
        table_path(tmp_path).write_text("one\ntw")
        watcher.on_record({})
        shown.append("|")
        table_path(tmp_path).write_text("one\ntwo\n")
        json_path(tmp_path).write_text('{"version": 3}')
        return info

    shown: list[str] = []
    monkeypatch.setattr("gangline.orchestrator.api.run", run)
    outcome = bench_comm.run_on_ray(
        CommBenchConfig(iters=3), num_ranks=4, device="cuda", num_gpus=1, address="auto",
        runs=tmp_path, show=shown.append, note=lambda text: None,
    )  # fmt: skip
    assert shown == ["one\n", "|", "two\n"]
    assert jobs[0]["workers"] == {"count": 4, "gpus": 1, "place": "spread"}
    assert jobs[0]["bench"]["iters"] == 3
    assert outcome.documents == [{"version": 3}]
    failure = "all_reduce: average bus bandwidth 1 GB/s, wanted at least 9"
    assert outcome.failures == ([] if state == "SUCCEEDED" else [failure])


def test_a_bench_on_ray_that_is_lost_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Info(tmp_path, "FAILED", "rank 2 on n was killed")
    monkeypatch.setattr("gangline.orchestrator.api.run", lambda file, **more: lost)
    with pytest.raises(GanglineError, match="FAILED: rank 2 on n was killed"):
        bench_comm.run_on_ray(
            CommBenchConfig(), num_ranks=4, device="cpu", num_gpus=1, address="auto",
            runs=tmp_path, show=print, note=print,
        )  # fmt: skip
