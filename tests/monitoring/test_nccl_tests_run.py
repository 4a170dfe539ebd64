"""The binaries are found, run with checked arguments, and read; a fake one stands in."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from gangline.monitoring.comm_bench_config import CommBenchConfig
from gangline.monitoring.nccl_tests_run import (
    NcclTestsError,
    arguments,
    find_binary,
    run_binary,
)

HERE = Path(__file__).parent
SAMPLES = HERE / "nccl_tests_output"
ALL_FLAGS = [f"-{letter}" for letter in "tgbeifnmwNpIKcodrzyTGCaRxDVJSMu"]


class Binary:
    """A folder with a fake all_reduce_perf; `behave` says what it does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = folder / "all_reduce_perf"
        source = (HERE / "fake_nccl_tests.py").read_text().splitlines()
        script.write_text("\n".join([f"#!{sys.executable}", *source[1:]]) + "\n")
        script.chmod(0o755)
        self.behave()

    def behave(self, **behaviour: object) -> None:
        defaults = {
            "flags": ALL_FLAGS,
            "sample": str(SAMPLES / "v2.18.5-all_reduce.txt"),
            "json": str(SAMPLES / "v2.19.6-schema-3.json"),
        }
        (self.folder / "behaviour.json").write_text(json.dumps({**defaults, **behaviour}))

    def called(self) -> dict[str, object]:
        return dict(json.loads((self.folder / "called.json").read_text()))

    def run(self, config: CommBenchConfig | None = None, **more: object):
        config = config or CommBenchConfig(implementation="nccl-tests", binaries=str(self.folder))
        return run_binary(
            "all_reduce", config, num_threads=1, num_gpus=8, environment=dict(os.environ),
            **more,  # type: ignore[arg-type]
        )  # fmt: skip


@pytest.fixture
def binary(tmp_path: Path) -> Binary:
    return Binary(tmp_path)


def test_a_run_is_streamed_and_read(binary: Binary) -> None:
    lines: list[str] = []
    done = binary.run(on_line=lines.append)
    assert "".join(lines) == done.text == (SAMPLES / "v2.18.5-all_reduce.txt").read_text()
    assert done.exit_code == 0
    assert (done.report.version, done.report.operation) == ("2.18.5", "all_reduce")
    # Figures come from the JSON, which has more digits.
    assert done.report.busbw_gbs == 27.118122
    assert done.document is not None
    assert "hunter2" not in json.dumps(done.document)
    assert "wrong values in 1 measurements" in done.sentence()
    argv = binary.called()["argv"]
    assert isinstance(argv, list)
    assert argv[:6] == ["-g", "8", "-b", "33554432", "-e", "33554432"]
    assert argv[-2] == "-J"
    assert not Path(argv[-1]).exists(), "the scratch folder is gone"


def test_the_settings_become_arguments_and_no_shell_sees_them(binary: Binary) -> None:
    config = CommBenchConfig(
        implementation="nccl-tests",
        binaries=str(binary.folder),
        min_bytes=8,
        max_bytes=128 << 20,
        step_factor=2,
        datatype="half",
        redop="max",
        blocking=2,
        cudagraph=5,
        local_register=2,
        min_busbw_gbs=100.5,
    )
    binary.run(config)
    called = binary.called()
    assert called["min_bw"] == "100.5"
    wanted = arguments(config, num_threads=1, num_gpus=8, json_file=None)
    assert called["argv"][: len(wanted)] == wanted  # type: ignore[index]
    assert " ".join(wanted) == (
        "-g 8 -b 8 -e 134217728 -f 2 -n 20 -w 1 -z 2 -d half -o max -G 5 -R 2"
    )


def test_an_old_binary_gets_no_flag_that_it_does_not_know(binary: Binary) -> None:
    old = [flag for flag in ALL_FLAGS if flag not in ("-J", "-I", "-S")]
    binary.behave(flags=old, sample=str(SAMPLES / "v2.0.0-all_reduce.txt"))
    done = binary.run()
    assert "-J" not in binary.called()["argv"]  # type: ignore[operator]
    assert done.document is None
    assert done.report.busbw_gbs == 50.4113
    config = CommBenchConfig(
        implementation="nccl-tests", binaries=str(binary.folder), per_iter_timing=True
    )
    with pytest.raises(NcclTestsError, match="too old for -I"):
        binary.run(config)


def test_what_it_says_when_it_fails(binary: Binary) -> None:
    binary.behave(sample=None, json=None, exit_code=3)
    with pytest.raises(NcclTestsError, match="exit code 3 and no table; it said: no CUDA device"):
        binary.run()
    binary.behave(sample=str(SAMPLES / "v2.19.6-broadcast-killed.txt"), json=None, exit_code=139)
    done = binary.run()
    assert done.exit_code == 139
    assert done.sentence() == "all_reduce: exit code 139 before its end (no footer)"
    binary.behave(flags=[])
    with pytest.raises(NcclTestsError, match="does not print nccl-tests' help"):
        binary.run()


def test_a_missing_binary(tmp_path: Path) -> None:
    with pytest.raises(NcclTestsError, match=r"scatter_perf is not in .*bench.binaries"):
        find_binary("scatter", tmp_path, "/usr/bin")
    with pytest.raises(NcclTestsError, match="not on PATH"):
        find_binary("scatter", None, str(tmp_path))
    (tmp_path / "scatter_perf_mpi").write_text("#!/bin/sh\n")
    (tmp_path / "scatter_perf_mpi").chmod(0o755)
    assert find_binary("scatter", None, str(tmp_path)) == tmp_path / "scatter_perf_mpi"
    broken = tmp_path / "gather_perf"
    broken.write_bytes(b"\x7fELF nothing")
    broken.chmod(0o755)
    with pytest.raises(NcclTestsError, match="cannot be started"):
        run_binary(
            "gather",
            CommBenchConfig(implementation="nccl-tests", binaries=str(tmp_path)),
            num_threads=1, num_gpus=1, environment={},
        )  # fmt: skip


def test_a_stop_ends_it_at_once(binary: Binary) -> None:
    binary.behave(sleep_s=60)
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    begin_s = time.monotonic()
    done = binary.run(should_stop=stop.is_set)
    assert time.monotonic() - begin_s < 4
    assert done.exit_code == -15
    pid = int((binary.folder / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()
