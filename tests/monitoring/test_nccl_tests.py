"""NVIDIA's outputs of many versions are read; what is no row is left out."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.monitoring.nccl_tests import (
    NcclTestsFormatError,
    load_document,
    parse_json,
    parse_reports,
    redact_document,
)

SAMPLES = Path(__file__).with_name("nccl_tests_output")
TEXTS = sorted(SAMPLES.glob("*.txt"))
DOCUMENTS = sorted(SAMPLES.glob("*.json"))


def only(name):
    (report,) = parse_reports((SAMPLES / name).read_text())
    return report


def test_before_2_13_there_is_an_error_and_no_root():
    report = only("v2.0.0-all_reduce.txt")
    assert (report.version, report.operation, report.num_devices) == (None, None, 8)
    assert (report.num_failed, report.busbw_gbs, report.is_fast) == (0, 50.4113, None)
    assert [row.size_bytes for row in report.rows] == [8, 1048576, 134217728]
    row = report.rows[1]
    assert (row.count, row.type_name, row.redop, row.root) == (262144, "float", "sum", None)
    assert row.out_of_place is not None
    assert row.out_of_place.num_wrong is None
    assert row.out_of_place.error == 2e-07
    assert (row.out_of_place.time_us, row.out_of_place.busbw_gbs) == (71.43, 25.69)


def test_operations_without_operator_and_root_and_without_a_check():
    report = only("v2.10.0-all_gather.txt")
    row = report.rows[0]
    assert (row.redop, row.root, row.count) == (None, None, 131072)
    assert row.in_place is not None
    assert row.in_place.error is None
    assert row.in_place.algbw_gbs == pytest.approx(52.75, abs=0.01)
    assert report.is_ok


def test_mpirun_s_tags_and_the_log_among_the_rows():
    report = only("v2.13.0-reduce-mpirun.txt")
    assert [row.root for row in report.rows] == [0, 0, 1]
    assert [half.num_wrong for half in report.rows[2].halves] == [3, 3]
    assert (report.num_failed, report.is_fast, report.is_ok) == (2, False, False)


def test_time_stamps_and_unchecked_halves():
    report = only("v2.17.6-alltoall-S.txt")
    assert (report.operation, report.version, report.nccl_version) == ("alltoall", "2.17.6", 22707)
    row = report.rows[1]
    assert row.timestamp == "2025-10-28 10:20:47"
    assert row.in_place is not None
    assert row.in_place.num_wrong is None
    assert row.out_of_place is not None
    assert row.out_of_place.num_wrong == 0
    assert row.redop == "none"


def test_iteration_columns():
    report = only("v2.19.6-all_reduce-I-S.txt")
    half = report.rows[0].out_of_place
    assert half is not None
    assert (half.iter_min_us, half.iter_max_us, half.iter_p99_us) == (1201.1, 1502.3, 1502.3)
    assert half.iter_cv_percent == 5.31
    assert report.rows[0].timestamp == "2026-09-01 08:00:01"


def test_cpu_time_wrong_values_and_errors():
    report = only("v2.19.6-reduce_scatter-C.txt")
    half = report.rows[0].out_of_place
    assert half is not None
    assert half.is_cpu_time
    assert half.num_wrong == 1234570
    assert (report.num_failed, report.is_fast) == (16, False)
    assert report.errors == ["unhandled cuda error"]
    assert report.rows[0].type_name == "bfloat16"


def test_the_empty_operator_of_hypercube():
    row = only("v2.19.6-hypercube.txt").rows[0]
    assert (row.redop, row.root, row.type_name) == ("", -1, "float")
    assert row.out_of_place is not None
    assert row.out_of_place.time_us == 400.0


def test_a_run_that_was_killed_is_not_complete():
    report = only("v2.19.6-broadcast-killed.txt")
    assert len(report.rows) == 1, "half a row is none"
    assert not report.is_complete
    assert not report.is_ok


def test_a_replayed_trace_has_only_the_in_place_half():
    lines = (SAMPLES / "v2.18.5-all_reduce.txt").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("           8"))
    line = lines[at]
    # What nccl-tests prints in place of the out-of-place half: 32 blanks.
    lines[at] = line[:52] + " " * 32 + line[52 + 33 :]
    (report,) = parse_reports("\n".join(lines))
    assert report.rows[0].out_of_place is None
    assert report.rows[0].in_place is not None
    assert report.rows[0].in_place.time_us == 31.5


def test_several_tables_one_after_the_other():
    names = ("v2.18.5-all_reduce.txt", "v2.0.0-all_reduce.txt", "v2.17.6-alltoall-S.txt")
    texts = [(SAMPLES / name).read_text() for name in names]
    reports = parse_reports("".join(texts))
    assert [report.operation for report in reports] == ["all_reduce", None, "alltoall"]
    assert [len(report.rows) for report in reports] == [4, 3, 2]
    assert [report.busbw_gbs for report in reports] == [171.304, 50.4113, 198.11]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_json_of_every_schema_version(path):
    report = parse_json(path.read_text())
    assert report.schema_version == int(path.stem[-1])
    assert (report.operation, report.nccl_version, report.num_devices) == ("all_reduce", 23007, 2)
    assert report.busbw_gbs == 27.118122, "schema version 1 misspells it"
    assert (report.num_failed, report.is_fast, report.is_ok) == (1, None, False)
    first, second = report.rows
    assert (first.size_bytes, first.root) == (33554432, -1)
    assert first.in_place is not None
    assert first.in_place.num_wrong is None
    assert second.out_of_place is None
    assert second.in_place is not None
    assert second.in_place.algbw_gbs != second.in_place.algbw_gbs, "nan"
    has_spread = report.schema_version > 1
    assert (first.in_place.iter_p99_us == 1300.5) == has_spread


def test_secrets_in_the_environment_are_not_kept():
    document = load_document((SAMPLES / "v2.19.6-schema-3.json").read_text())
    assert "hunter2" in json.dumps(document), "nccl-tests writes the whole environment"
    kept = redact_document(document)
    assert kept["env"] == ["NCCL_DEBUG=WARN", "NCCL_IB_HCA=mlx5"]
    assert "hunter2" not in json.dumps(kept)
    assert parse_json(json.dumps(kept)).rows == parse_json(json.dumps(document)).rows


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 3',
        '{"config": {}, "results": 3, "version": 3}',
        '{"config": {}, "results": [{}], "version": 3}',
        '{"config": [], "results": [], "version": 3}',
    ],
)
def test_what_is_no_report(text):
    with pytest.raises(NcclTestsFormatError):
        parse_json(text)


@given(st.text(max_size=300))
def test_any_text_has_no_report_or_a_sane_one(text):
    for report in parse_reports(text):
        assert report.rows or report.is_complete


@given(data=st.data())
def test_a_table_that_is_cut_anywhere_has_the_same_rows_up_to_there(data):
    path = data.draw(st.sampled_from(TEXTS))
    text = path.read_text()
    (whole,) = parse_reports(text)
    cut = text[: data.draw(st.integers(0, len(text)))]
    for report in parse_reports(cut):
        # The last cell of a row that is cut may be shorter than it was; nothing else changes.
        whole_lines = cut.endswith("\n")
        rows = report.rows if whole_lines else report.rows[:-1]
        assert rows == whole.rows[: len(rows)]
        assert len(report.rows) <= len(whole.rows)
