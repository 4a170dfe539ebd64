"""The benchmark's table and JSON: as nccl-tests has them, read by two parsers."""

import json
import math
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.monitoring.comm_bench_scenarios import ENVIRONMENT, report

from gangline.comm.mesh import Mesh
from gangline.comm.perf_sizes import OPERATIONS
from gangline.monitoring.comm_bench import iteration_stats
from gangline.monitoring.comm_bench_config import CommBenchConfig, parse_size
from gangline.monitoring.comm_bench_json import visible_environment
from gangline.monitoring.comm_bench_table import Block, columns, footer, number, row
from gangline.monitoring.metrics import metric
from gangline.monitoring.nccl_tests import parse_json, parse_reports
from gangline.orchestrator.bench_program import bench_metrics

SCENARIOS = Path(__file__).with_name("comm_bench_scenarios.py")
SAMPLES = Path(__file__).with_name("nccl_tests_output")
SMALL = {"min_bytes": 64, "max_bytes": 4096, "step_factor": 8, "iters": 2}


def read_as_documented(text):
    """Read a table from nccl-tests' documented format alone: 13 words a row, # is a comment.

    Written without a look at our own parser.
    """
    rows = []
    for line in text.splitlines():
        if not line or line[0] == "#":
            continue
        words = line.split()
        assert len(words) == 13, line
        wrong = [None if w == "N/A" else int(w) for w in (words[8], words[12])]
        rows.append(
            {
                "size": int(words[0]),
                "count": int(words[1]),
                "type": words[2],
                "redop": words[3],
                "root": int(words[4]),
                "out": (float(words[5]), float(words[6]), float(words[7]), wrong[0]),
                "in": (float(words[9]), float(words[10]), float(words[11]), wrong[1]),
            }
        )
    failed = re.search(r"^# Out of bounds values : (\d+) (OK|FAILED)$", text, re.MULTILINE)
    bandwidth = re.search(r"^# Avg bus bandwidth    : (\S+) (OK|FAILED|)$", text, re.MULTILINE)
    assert failed is not None
    assert bandwidth is not None
    return rows, int(failed[1]), float(bandwidth[1])


def test_the_column_header_is_nccl_tests_own():
    with_iterations = CommBenchConfig(per_iter_timing=True, per_iter_skip=2, report_timestamps=True)
    for name, config in {
        "v2.18.5-all_reduce.txt": CommBenchConfig(),
        "v2.19.6-all_reduce-I-S.txt": with_iterations,
        "v2.19.6-reduce_scatter-C.txt": CommBenchConfig(report_cputime=True),
    }.items():
        lines = columns(config)
        assert lines in (SAMPLES / name).read_text(), name


def test_rows_and_footer_are_nccl_tests_own():
    sample = (SAMPLES / "v2.18.5-all_reduce.txt").read_text()
    halves = [
        Block(us, size / us / 1e3, size / us / 1e3 * 14 / 8, 0)
        for size, us in ((8589934592, 31250.4), (8589934592, 131250.4))
    ]
    line = row(
        size_bytes=8589934592,
        count=2147483648,
        type_name="float",
        redop="sum",
        root=-1,
        blocks=halves,
    )
    assert line in sample
    end = footer("all_reduce", num_failed=0, busbw_gbs=171.304, min_busbw_gbs=171)
    assert sample.endswith(end)
    broken = footer("all_reduce", num_failed=3, busbw_gbs=10.0, min_busbw_gbs=11.2)
    assert ": 3 FAILED\n" in broken
    assert ": 10 FAILED\n" in broken
    assert ": 10 OK\n" in footer("x", num_failed=0, busbw_gbs=10.0, min_busbw_gbs=11.1)


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [
        (1234.5, 7, "1234.50"),
        (31250.4, 7, "31250.4"),
        (9999.996, 7, "10000.0"),
        (131250.4, 7, "131250"),
        (12345678.0, 7, "1.2e+07"),
        (0.004, 6, "0.00"),
        (2739.13, 6, "2739.1"),
        (99999.96, 6, "100000"),
        (1234567.0, 6, "1e+06"),
    ],
)
def test_numbers(value, width, text):
    assert number(value, width) == text
    assert len(number(value, width)) <= width


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_operation_reads_in_two_parsers_and_as_json(rank_pool, world_size):
    found = rank_pool.run(
        world_size,
        (SCENARIOS, "report"),
        operations=list(OPERATIONS),
        config=SMALL,
        timeout_s=120,
    )[0]
    reports = parse_reports(found["text"])
    assert [told.operation for told in reports] == list(OPERATIONS)
    tables = re.split(r"(?=^# nccl-tests version)", found["text"], flags=re.MULTILINE)[1:]
    for told, document, table in zip(reports, found["documents"], tables, strict=True):
        name = told.operation
        exact = parse_json(json.dumps(document))
        assert told.is_ok
        assert exact.is_ok
        assert told.num_devices == exact.num_devices == world_size
        assert exact.schema_version == 3
        assert exact.operation == name
        assert told.busbw_gbs == pytest.approx(exact.busbw_gbs, rel=1e-4, abs=1e-6)
        assert [row.size_bytes for row in told.rows] == [row.size_bytes for row in exact.rows]
        if name != "hypercube":  # which leaves a column empty
            rows, failed, bandwidth = read_as_documented(table)
            assert failed == 0
            assert bandwidth == told.busbw_gbs
            for ours, theirs in zip(told.rows, rows, strict=True):
                assert (ours.size_bytes, ours.count) == (theirs["size"], theirs["count"])
                assert (ours.redop, ours.root) == (theirs["redop"], theirs["root"])
                for half, words in zip(ours.halves, ("out", "in"), strict=True):
                    figures = (half.time_us, half.algbw_gbs, half.busbw_gbs, half.num_wrong)
                    assert figures == theirs[words]
        for row_, result in zip(exact.rows, document["results"], strict=True):
            for value in row_.halves:
                assert value.time_us > 0
            assert result["root"] == f"{row_.root:6d}", "padded text, as theirs"


@pytest.mark.ranks
def test_json_has_the_keys_of_schema_version_3(rank_pool):
    config = {**SMALL, "per_iter_timing": True, "iters": 4, "per_iter_skip": 1}
    found = rank_pool.run(2, (SCENARIOS, "report"), operations=["all_reduce"], config=config)[0]
    document = found["documents"][0]
    sample = json.loads((SAMPLES / "v2.19.6-schema-3.json").read_text())
    assert list(document) == list(sample)
    assert set(document["config"]) == (set(sample["config"]) - {"step_bytes"}) | {"step_factor"}
    assert list(document["results"][0]) == list(sample["results"][0])
    assert list(document["results"][0]["out_of_place"]) == list(
        sample["results"][0]["out_of_place"]
    )
    spread = document["results"][0]["in_place_per_iter"]
    assert list(spread) == list(sample["results"][0]["in_place_per_iter"])
    for key in ("out_of_bounds", "average_bus_bandwidth"):
        assert list(document[key]) == list(sample[key])
    # The statistics leave out the first iteration, and the times are those of the slowest rank.
    per_rank = spread["per_process_max_times_us"]
    assert spread["times_us"] == [max(pair) for pair in zip(*per_rank, strict=True)]
    assert spread["min_us"] == min(spread["times_us"][1:])
    assert spread["max_us"] == max(spread["times_us"][1:])
    printed = parse_reports(found["text"])[0].rows[0].in_place
    assert printed is not None
    assert printed.iter_max_us == pytest.approx(spread["max_us"], abs=0.01, rel=1e-3)


@pytest.mark.ranks
def test_wrong_values_are_told_everywhere(rank_pool):
    config = {**SMALL, "min_bytes": 4096}
    first, second = rank_pool.run(2, (SCENARIOS, "report_with_a_liar"), config=config)
    assert first["ok"] == second["ok"] == [False]
    assert "wrong values in 2 measurements" in first["sentences"][0]
    told = parse_reports(first["text"])[0]
    assert told.num_failed == 2
    assert [half.num_wrong for half in told.rows[0].halves] == [2, 2]
    document = first["documents"][0]
    assert document["out_of_bounds"] == {"count": 2, "okay": "false"}
    assert document["results"][0]["out_of_place"]["nwrong"] == 2.0


@pytest.mark.ranks
def test_any_rank_may_ask_for_the_end(rank_pool):
    config = {**SMALL, "run_cycles": 0}
    found = rank_pool.run(
        2, (SCENARIOS, "report"), operations=["all_reduce"], config=config, stop_after=40
    )
    assert [one["stopped"] for one in found] == [[True], [True]]
    told = parse_reports(found[0]["text"])[0]
    assert told.is_complete
    assert 3 <= len(told.rows) < 20


@pytest.mark.ranks
def test_what_the_backend_cannot_do_is_refused_on_all_ranks(rank_pool):
    config = {**SMALL, "datatype": "f8e5m2", "implementation": "torch"}
    found = rank_pool.run(2, (SCENARIOS, "refuse"), config=config)
    assert found[0] == found[1]
    assert "all_reduce has no f8e5m2 (sum) with torch.distributed backend=gloo" in found[0]
    assert "bench.datatype" in found[0]


@pytest.mark.ranks
def test_all_types_leave_out_what_there_is_not(rank_pool):
    config = {**SMALL, "datatype": "all", "max_bytes": 64}
    text = rank_pool.run(2, (SCENARIOS, "report"), operations=["all_reduce"], config=config)[0][
        "text"
    ]
    assert "# not supported here, left out: f8e4m3 (sum), f8e5m2 (sum)\n" in text
    assert [row.type_name for row in parse_reports(text)[0].rows][-1] == "bfloat16"


def test_one_rank_alone_has_a_table_too():
    found = report(Mesh.single(), ["all_gather", "hypercube"], {**SMALL, "min_busbw_gbs": 1.0})
    assert found["ok"] == [False, False], "nothing crosses a bus"
    assert "wanted at least 0.9 (9/10 of bench.min_busbw_gbs)" in found["sentences"][0]
    assert "# Avg bus bandwidth    : 0 FAILED\n" in found["text"]
    assert found["documents"][0]["average_bus_bandwidth"] == {"bandwidth": 0.0, "okay": "false"}
    assert found["documents"][0]["args"][:3] == ["all_gather_perf", "-b", "64"]
    assert found["num_ops"] > 10


def test_the_environment_is_never_shown_with_its_secrets():
    shown = visible_environment(ENVIRONMENT)
    assert shown == [
        "GLOO_SOCKET_IFNAME=lo",
        "NCCL_AUTH_TOKEN=***",
        "NCCL_CONF_URI=https://***@host/x",
        "NCCL_DEBUG=WARN",
    ]
    found = report(Mesh.single(), ["all_reduce"], SMALL)
    assert found["documents"][0]["env"] == shown
    assert "hunter2" not in json.dumps(found["documents"])


def test_every_figure_of_a_row_is_a_known_metric():
    found = report(Mesh.single(), ["alltoall"], SMALL)
    values = bench_metrics("alltoall", found["rows"][-1])
    assert "bench/alltoall/out_of_place/num_wrong" in values
    assert "bench/alltoall/in_place/num_wrong" not in values, "unchecked"
    for name in values:
        assert not metric(name).once_per_step


def test_statistics_of_iterations():
    stats = iteration_stats([float(i) for i in range(1, 101)])
    assert (stats.min_us, stats.max_us) == (1e6, 1e8)
    assert (stats.p50_us, stats.p95_us, stats.p99_us) == (51e6, 95e6, 99e6)
    assert stats.avg_us == pytest.approx(50.5e6)
    assert stats.stdev_us == pytest.approx(math.sqrt((100**2 - 1) / 12) * 1e6)
    one = iteration_stats([2e-6])
    assert one.p99_us == one.p50_us == pytest.approx(2.0)
    assert one.cv_percent == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("8", 8), ("64K", 65536), ("64k", 65536), ("1M", 1 << 20), ("1.5G", 3 << 29), (77, 77)],
)
def test_sizes(text, size):
    assert parse_size(text) == size
    assert CommBenchConfig(min_bytes=1, max_bytes=text).max_bytes == size


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_bytes": "1T"}, "K, M or G"),
        ({"min_bytes": "-1"}, "K, M or G"),
        ({"min_bytes": 0}, "greater than or equal to 1"),
        ({"min_bytes": "2M", "max_bytes": "1M"}, "bench.max_bytes to at least"),
        ({"min_bytes": 1, "max_bytes": "1G", "step_bytes": 1}, "bench.step_factor to 2"),
        ({"per_iter_skip": 3}, "bench.per_iter_timing to true"),
        ({"per_iter_timing": True, "per_iter_skip": 20}, "at most 19"),
        ({"cudagraph": 1}, "bench.implementation to nccl-tests"),
        ({"local_register": 2, "implementation": "torch"}, "nccl-tests"),
        ({"binaries": "/opt/nccl-tests"}, "nccl-tests"),
        ({"operations": ["allreduce"]}, "operations"),
        ({"iterations": 3}, "iterations"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValidationError, match=re.escape(words)):
        CommBenchConfig.model_validate_json(json.dumps(settings))


def test_flags_are_nccl_tests_own():
    config = CommBenchConfig(
        min_bytes=8, max_bytes=1 << 20, step_factor=2, per_iter_timing=True, root=-1, timeout_s=1.6
    )
    assert config.flags() == [
        "-b", "8", "-e", "1048576", "-f", "2", "-n", "20", "-w", "1", "-I", "1", "-r", "-1",
        "-T", "2",
    ]  # fmt: skip
    assert CommBenchConfig(step_bytes=4096).flags()[4:6] == ["-i", "4096"]
    with pytest.raises(ValueError, match=re.escape("bench.root 4 is no rank of 4")):
        CommBenchConfig(operations=["reduce"], root=4).check_ranks(4)
    CommBenchConfig(operations=["all_reduce"], root=4).check_ranks(4)
