"""`gangline bench comm`: what goes where, how it ends, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from gangline.monitoring.nccl_tests import parse_json, parse_reports
from gangline.orchestrator import cli
from gangline.orchestrator.bench_files import summary_lines
from gangline.orchestrator.commands_bench_flags import (
    BenchFlags,
    in_flags,
    make_config,
    reserve_output,
)
from gangline.orchestrator.errors import UsageError

HERE = Path(__file__).parent
SAMPLES = HERE.parent / "monitoring" / "nccl_tests_output"
SMALL = ("-b", "64", "-e", "4K", "-f", "8", "-n", "2")
COMMAND = [sys.executable, "-m", "gangline.orchestrator.cli", "bench", "comm"]


class Shell:
    """Run `gangline bench comm` in this process."""

    def __init__(self, capfd: Any) -> None:
        self._capfd = capfd
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        code = cli.main(["bench", "comm", *words])
        self.out, self.err = self._capfd.readouterr()
        assert "Traceback" not in self.out + self.err
        return code


@pytest.fixture
def shell(capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NCCL_TESTS_MIN_BW", raising=False)
    return Shell(capfd)


# What is refused before anything starts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["all_red"], "no operation 'all_red'; did you mean all_reduce?"),
        (["all_reduce,nothing"], "no operation 'nothing'; wanted all_reduce, all_gather"),
        (["-b", "2M", "-e", "1M"], "set -e to at least 2M"),
        (["-b", "1X"], "-b: found the text '1X'"),
        (["-n", "0"], "-n: found the whole number 0"),
        (["-d", "floot"], "-d: found the text 'floot'"),
        (["-o", "mulsum"], "-o: found the text 'mulsum'"),
        (["reduce", "-r", "2"], "-r 2 is no rank of 2 (--ranks)"),
        (["-r", "x"], "-r is 'x'; wanted the number of a rank, or all"),
        (["-G", "3"], "set --implementation to nccl-tests"),
        (["-R", "1", "--implementation", "torch"], "remove -R"),
        (["-C", "2"], "-C is 2; wanted 0 or 1"),
        (["-K", "3"], "set -I to true"),
        (["--ranks", "3", "-g", "2"], "--ranks 3 and -t 1 -g 2 disagree"),
        (["--ranks", "0"], "--ranks: found the whole number 0"),
        (["-J", "report.txt"], "-J is report.txt; wanted a name that ends in .json"),
        (["-Q", "3"], "Unknown option"),
    ],
)
def test_2_a_wrong_flag_is_named_with_its_mend(shell: Shell, words: list[str], said: str) -> None:
    assert shell(*words) == 2
    assert shell.out == ""
    (line,) = [line for line in shell.err.splitlines() if said in line]
    assert line.startswith("gangline: ")
    assert not list(Path().iterdir())


def test_2_a_wrong_bandwidth_in_the_environment(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_TESTS_MIN_BW", "fast")
    assert shell() == 2
    assert "$NCCL_TESTS_MIN_BW is 'fast'" in shell.err


def test_flags_are_the_settings_of_a_job_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_TESTS_MIN_BW", "1.5")
    flags = BenchFlags(
        min_bytes="8", max_bytes="128M", step_factor=2, root="all", threads=2, gpus=4
    )
    config = make_config(flags.settings(), 8, 1)
    assert (config.min_bytes, config.max_bytes, config.root) == (8, 128 << 20, -1)
    assert config.min_busbw_gbs == 1.5
    assert flags.num_ranks(None) == flags.num_ranks(8) == 8
    assert BenchFlags().num_ranks(None) is None
    with pytest.raises(UsageError):
        flags.num_ranks(2)


def test_an_old_report_is_never_written_over(tmp_path: Path) -> None:
    names = [reserve_output(tmp_path / "x.json") for _ in range(3)]
    assert [path.name for path in names if path] == ["x.json", "x.json.0", "x.json.1"]


# Runs


@pytest.mark.ranks
def test_the_table_is_all_that_stdout_gets(shell: Shell) -> None:
    assert shell("all_reduce,alltoall", "--ranks", "2", *SMALL, "-J", "x.json") == 0
    assert shell.err == ""
    assert shell.out.startswith("# Writing JSON output to x.json\n# nccl-tests version ")
    first, second = parse_reports(shell.out)
    assert (first.operation, second.operation) == ("all_reduce", "alltoall")
    assert (first.num_devices, len(first.rows)) == (2, 3)
    documents = json.loads(Path("x.json").read_text())
    assert [parse_json(json.dumps(one)).operation for one in documents] == [
        "all_reduce", "alltoall",
    ]  # fmt: skip
    assert "-f" in documents[0]["args"]


@pytest.mark.ranks
def test_1_too_slow_and_the_report_is_there_nevertheless(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_TESTS_MIN_BW", "1e5")
    assert shell("broadcast", *SMALL, "--json", "-J", "x.json") == 1
    assert "broadcast: average bus bandwidth" in shell.err
    assert "$NCCL_TESTS_MIN_BW" in shell.err
    printed = json.loads(shell.out)
    assert printed == json.loads(Path("x.json").read_text())
    assert printed["average_bus_bandwidth"]["okay"] == "false"


def test_what_is_said_of_a_job_file_is_said_of_the_flags() -> None:
    said = "choose another bench.datatype or bench.redop, or set bench.implementation to torch"
    assert in_flags(said) == "choose another -d or -o, or set --implementation to torch"
    assert in_flags("bench.per_iter_skip, bench.min_busbw_gbs") == "-K, $NCCL_TESTS_MIN_BW"
    assert in_flags("workers.count and bench.operations") == "--ranks and OP"


class Running:
    """The real command in a process of its own, up to its first row."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "-b", "64", "-e", "64", "-N", "0", "--ranks", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith("#"):
                break
        self.ranks = [
            child
            for child in psutil.Process(self.process.pid).children()
            if "gangline.orchestrator.bench_comm_rank" in child.cmdline()
        ]
        assert len(self.ranks) == 2

    def end(self) -> tuple[int, str]:
        try:
            _, err = self.process.communicate(timeout=30)
        finally:
            self.process.kill()
        _, alive = psutil.wait_procs(self.ranks, timeout=10)
        assert not alive, "ranks are left behind"
        return self.process.returncode, err


@pytest.fixture
def running(tmp_path: Path) -> Any:
    made = Running(tmp_path)
    yield made
    made.process.kill()
    for rank in made.ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()


@pytest.mark.ranks
def test_1_a_rank_that_is_killed_is_named(running: Running) -> None:
    running.ranks[1].kill()
    code, err = running.end()
    assert code == 1
    (line,) = err.splitlines()
    assert "was killed by SIGKILL" in line


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_command(running: Running, number: signal.Signals) -> None:
    os.kill(running.process.pid, number)
    code, err = running.end()
    assert code == (130 if number == signal.SIGINT else -9)
    assert err == ""


# NVIDIA's binaries


@pytest.fixture
def binaries(tmp_path: Path) -> Path:
    source = (HERE.parent / "monitoring" / "fake_nccl_tests.py").read_text().splitlines()
    script = tmp_path / "all_reduce_perf"
    script.write_text("\n".join([f"#!{sys.executable}", *source[1:]]) + "\n")
    script.chmod(0o755)
    behaviour = {
        "flags": ["-t", "-g", "-b", "-e", "-n", "-w", "-J"],
        "sample": str(SAMPLES / "v2.18.5-all_reduce.txt"),
    }
    (tmp_path / "behaviour.json").write_text(json.dumps(behaviour))
    return tmp_path


def test_the_binaries_table_is_handed_on(shell: Shell, binaries: Path) -> None:
    words = ["--implementation", "nccl-tests", "--binaries", str(binaries), "-t", "2", "-g", "4"]
    assert shell(*words) == 0
    assert shell.out == (SAMPLES / "v2.18.5-all_reduce.txt").read_text()
    argv = json.loads((binaries / "called.json").read_text())["argv"]
    assert argv[:4] == ["-t", "2", "-g", "4"]


def test_1_a_missing_binary_and_one_that_finds_wrong_values(shell: Shell, binaries: Path) -> None:
    words = ["--implementation", "nccl-tests", "--binaries", str(binaries)]
    assert shell("gather", *words) == 1
    assert "set --binaries to its build folder" in shell.err
    behaviour = json.loads((binaries / "behaviour.json").read_text())
    behaviour |= {"sample": str(SAMPLES / "v2.13.0-reduce-mpirun.txt"), "exit_code": 1}
    (binaries / "behaviour.json").write_text(json.dumps(behaviour))
    assert shell(*words) == 1
    assert "all_reduce: average bus bandwidth 12.5 GB/s, wrong values in 2" in shell.err


# `kind: bench`

JOB = """
kind: bench
workers: {count: 2, cpus: 0.5, place: spread}
bench:
  operations: [all_gather, reduce]
  implementation: torch
  min_bytes: 1K
  max_bytes: 64K
  step_factor: 64
  iters: 3
"""


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_bench_job_runs_on_ray_and_is_shown(tmp_path: Path) -> None:
    (tmp_path / "comm.yaml").write_text(JOB)
    gangline = [sys.executable, "-m", "gangline.orchestrator.cli"]
    ran = subprocess.run(
        [*gangline, "run", "comm.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    (artifacts,) = tmp_path.glob("runs/comm-*/artifacts")
    first, second = parse_reports((artifacts / "bench.txt").read_text())
    assert (first.operation, first.num_devices, len(first.rows)) == ("all_gather", 2, 2)
    assert (second.operation, second.is_ok) == ("reduce", True)
    documents = json.loads((artifacts / "bench.json").read_text())
    assert [len(parse_json(json.dumps(one)).rows) for one in documents] == [2, 2]
    shown = subprocess.run(
        [*gangline, "show", "@last"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = [line for line in shown.stdout.splitlines() if line.startswith("measured")]
    assert len(lines) == 2
    assert "all_gather, 1.0 KiB to 64.0 KiB: average bus bandwidth" in lines[0]
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [r for r in runs if r.info.run_name == artifacts.parent.name]
    points = client.get_metric_history(
        parent.info.run_id, "bench/all_gather/out_of_place/busbw_gbs"
    )
    assert [point.step for point in points] == [1024, 65536], "the step is the size"


def test_a_summary_tells_what_is_wrong(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    assert summary_lines(tmp_path) == []
    for name, sample in {
        "bench.txt": "v2.19.6-reduce_scatter-C.txt",
        "bench-rank-1.txt": "v2.19.6-broadcast-killed.txt",
        "bench-rank-2.txt": "v2.18.5-all_reduce.txt",
    }.items():
        (artifacts / name).write_text((SAMPLES / sample).read_text())
    assert summary_lines(tmp_path) == [
        "rank 1: broadcast, 32.0 MiB to 32.0 MiB: not finished",
        "rank 2: all_reduce, 8 B to 8.0 GiB: average bus bandwidth 171.304 GB/s, values right",
        "reduce_scatter, 32.0 MiB to 32.0 MiB: average bus bandwidth 2601.5 GB/s, WRONG VALUES in "
        "16 measurements",
    ]
