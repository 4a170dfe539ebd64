"""Read what NVIDIA's nccl-tests print: their table, of any version, and their JSON.

    parse_reports(text) -> [NcclReport, ...]    one per table; also of our own bench
    parse_json(text) -> NcclReport              schema versions 1 to 3

Columns are found by their names in the header, never by place: before 2.13 there is `error` in
place of `#wrong`, and each operation leaves out the columns that it has no use for; `-I` adds
columns and `-S` a time stamp; hypercube prints an empty operator. Lines that are neither comments
nor whole rows (NCCL's own log, a row cut off by a kill) are left out, and a report without its
footer says that it is not complete.

`parse_json` drops the environment, of which nccl-tests writes all; `redact_document` keeps a
document with what may be shown of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gangline.monitoring.comm_bench_json import visible_environment

Json = dict[str, Any]


class NcclTestsFormatError(ValueError):
    """The text is not what nccl-tests writes; says what was found."""


@dataclass(frozen=True)
class Half:
    """The out-of-place or the in-place figures of a row.

    `num_wrong` is None where nothing was checked, and in versions that print `error`, the largest
    deviation, instead. `is_cpu_time` tells that the time is that to start the operation (-C).
    """

    time_us: float
    algbw_gbs: float
    busbw_gbs: float
    num_wrong: int | None = None
    error: float | None = None
    is_cpu_time: bool = False
    iter_min_us: float | None = None
    iter_max_us: float | None = None
    iter_p99_us: float | None = None
    iter_cv_percent: float | None = None


@dataclass(frozen=True)
class Row:
    """One size. A column that the version does not print is None."""

    size_bytes: int
    count: int
    type_name: str
    redop: str | None
    root: int | None
    out_of_place: Half | None
    in_place: Half | None
    timestamp: str = ""

    @property
    def halves(self) -> tuple[Half, ...]:
        """Return the measurements of this row."""
        return tuple(half for half in (self.out_of_place, self.in_place) if half is not None)


@dataclass
class NcclReport:
    """One run of one binary.

    `num_failed` counts the measurements with wrong values ("Out of bounds values"). `is_fast`
    is the verdict on the bandwidth, None where none was asked for.
    """

    operation: str | None = None
    version: str | None = None
    nccl_version: int | None = None
    schema_version: int | None = None
    num_devices: int = 0
    rows: list[Row] = field(default_factory=list)
    num_failed: int | None = None
    busbw_gbs: float | None = None
    is_fast: bool | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether it came to its end."""
        return self.busbw_gbs is not None

    @property
    def is_ok(self) -> bool:
        """Whether it came to its end with right values and enough bandwidth."""
        return self.is_complete and not self.num_failed and self.is_fast is not False


# What mpirun --tag-output puts in front of a line.
_TAG = re.compile(r"^\[\d+,\d+\]<std(?:out|err)>:\s?")
_VERSION = re.compile(r"# nccl-tests version (\S+)(?:.*nccl-library=(\d+))?")
_STARTING = re.compile(r"# Collective test starting: (\S+)")
_SETTINGS = re.compile(r"# nThread \d+ nGpus \d+ ")
_DEVICE = re.compile(r"#\s+Rank\s+\d+ ")
_FAILED = re.compile(r"# Out of bounds values\s*: (\d+)")
_BUSBW = re.compile(r"# Avg bus bandwidth\s*: (\S+)\s*(OK|FAILED)?")
_ERROR = re.compile(r"# error: (.+)")
# Replayed traces have blanks for the out-of-place half; a row that was cut off has not.
_GAP = re.compile(r"\S {30,}\S")
_ITERATION_NAMES = {
    "i_min": "iter_min_us",
    "i_max": "iter_max_us",
    "i_p99": "iter_p99_us",
    "i_cv%": "iter_cv_percent",
}


def parse_reports(text: str | Iterable[str]) -> list[NcclReport]:
    """Read one or several tables, one after the other.

    Returns: nothing where there is no table.
    """
    parser = _Parser()
    for line in text.splitlines() if isinstance(text, str) else text:
        parser.take(_TAG.sub("", line.rstrip("\r\n")))
    return [report for report in parser.reports if report.rows or report.is_complete]


class _Parser:
    """Take line by line; a header line after a table begins the next report."""

    def __init__(self) -> None:
        self.reports: list[NcclReport] = []
        self._columns: _Columns | None = None
        self._has_settings = False

    def take(self, line: str) -> None:
        """Take one line, without its end."""
        if not line.lstrip().startswith("#"):
            self._take_row(line)
        elif found := _VERSION.match(line):
            report = self._report(begins=self._has_settings)
            report.version = found[1]
            report.nccl_version = int(found[2]) if found[2] else None
        elif found := _STARTING.match(line):
            self._report(begins=self._has_settings).operation = found[1].partition("_perf")[0]
        elif _SETTINGS.match(line):
            self._report(begins=self._has_settings)
            self._has_settings = True
        elif line.split()[1:3] == ["size", "count"]:
            self._columns = _Columns.of(line.split()[1:])
        else:
            self._take_fact(line)

    def _report(self, *, begins: bool = False) -> NcclReport:
        if begins or not self.reports:
            self.reports.append(NcclReport())
            self._columns, self._has_settings = None, False
        return self.reports[-1]

    def _take_row(self, line: str) -> None:
        row = self._columns.row(line) if self._columns else None
        if row is not None:
            self._report().rows.append(row)

    def _take_fact(self, line: str) -> None:
        report = self._report()
        if _DEVICE.match(line):
            report.num_devices += 1
        elif found := _FAILED.match(line):
            report.num_failed = int(found[1])
        elif found := _BUSBW.match(line):
            report.busbw_gbs = float(found[1])
            report.is_fast = {"OK": True, "FAILED": False}.get(found[2] or "")
        elif found := _ERROR.match(line):
            report.errors.append(found[1].strip())


@dataclass(frozen=True)
class _Columns:
    """The names of a table's columns: those of the row, then those of each half."""

    left: tuple[str, ...]
    half: tuple[str, ...]
    has_timestamp: bool

    @classmethod
    def of(cls, names: Sequence[str]) -> _Columns | None:
        """Return the columns of a header line; None if it has not two equal halves."""
        has_timestamp = names[-1] == "timestamp"
        names = names[:-1] if has_timestamp else names
        starts = [i for i, name in enumerate(names) if name in ("time", "cputime")]
        if len(starts) != 2:
            return None
        first, second = tuple(names[starts[0] : starts[1]]), tuple(names[starts[1] :])
        left = tuple(names[: starts[0]])
        return cls(left, first, has_timestamp) if first == second else None

    def row(self, line: str) -> Row | None:
        """Return the row that a line holds; None if it is no whole row."""
        cells, timestamp = line.split(), ""
        if self.has_timestamp and len(cells) > 2:
            *cells, date, clock = cells
            timestamp = f"{date} {clock}"
        left, half = len(self.left), len(self.half)
        if "redop" in self.left and len(cells) in (left - 1 + half, left - 1 + 2 * half):
            cells.insert(self.left.index("redop"), "")
        is_replay = len(cells) == left + half and _GAP.search(line) is not None
        if not is_replay and len(cells) != left + 2 * half:
            return None
        try:
            halves = [self._half(cells[at : at + half]) for at in range(left, len(cells), half)]
            return self._build(dict(zip(self.left, cells, strict=False)), halves, timestamp)
        except ValueError:
            return None  # a line of something else that has as many words

    def _half(self, cells: Sequence[str]) -> Half:
        named = dict(zip(self.half, cells, strict=True))
        wrong, error = named.get("#wrong", "N/A"), named.get("error", "N/A")
        return Half(
            time_us=float(cells[0]),
            algbw_gbs=float(named["algbw"]),
            busbw_gbs=float(named["busbw"]),
            num_wrong=None if wrong == "N/A" else int(float(wrong)),
            error=None if error == "N/A" else float(error),
            is_cpu_time=self.half[0] == "cputime",
            **{
                ours: float(named[theirs])
                for theirs, ours in _ITERATION_NAMES.items()
                if theirs in named
            },
        )

    @staticmethod
    def _build(named: Mapping[str, str], halves: Sequence[Half], timestamp: str) -> Row:
        return Row(
            size_bytes=int(named["size"]),
            count=int(named["count"]),
            type_name=named["type"],
            redop=named.get("redop"),
            root=int(named["root"]) if "root" in named else None,
            out_of_place=halves[0] if len(halves) == 2 else None,
            in_place=halves[-1],
            timestamp=timestamp,
        )


def parse_json(text: str) -> NcclReport:
    """Read the file that `-J` writes.

    Raises: NcclTestsFormatError when it is not such a file, or not whole.
    """
    document = load_document(text)
    try:
        return _report_of(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NcclTestsFormatError(
            f"JSON of schema version {document.get('version')!r} that cannot be read: "
            f"{type(error).__name__} {error}"
        ) from error


def load_document(text: str) -> Json:
    """Return the JSON object that a binary wrote.

    Raises: NcclTestsFormatError.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise NcclTestsFormatError(f"no JSON, or cut off: {error}") from error
    if not isinstance(document, dict) or "results" not in document or "config" not in document:
        raise NcclTestsFormatError("JSON without the keys `config` and `results`")
    return document


def redact_document(document: Json) -> Json:
    """Return the document with only those variables of its `env` that may be shown."""
    pairs = (str(item).partition("=") for item in document.get("env") or ())
    return {**document, "env": visible_environment({name: value for name, _, value in pairs})}


def _report_of(document: Json) -> NcclReport:
    # Schema version 1 misspells both.
    bandwidth = document.get("average_bus_bandwidth") or document.get("average_bus_bandwidith")
    verdict = (bandwidth or {}).get("okay")
    values = {key: value for key, value in (bandwidth or {}).items() if key != "okay"}
    program = str((document.get("args") or [""])[0]).rpartition("/")[2]
    return NcclReport(
        operation=program.partition("_perf")[0] if "_perf" in program else None,
        nccl_version=document.get("nccl_version"),
        schema_version=document["version"],
        num_devices=len(document["config"].get("devices", ())),
        rows=[_row_of(result) for result in document["results"]],
        num_failed=(document.get("out_of_bounds") or {}).get("count"),
        busbw_gbs=_float(next(iter(values.values()))) if values else None,
        is_fast={"true": True, "false": False}.get(str(verdict)),
        errors=[error for error in document.get("errors") or () if error],
    )


def _row_of(result: Json) -> Row:
    return Row(
        size_bytes=result["size"],
        count=result["count"],
        type_name=result["type"],
        redop=result["redop"],
        root=int(result["root"]),
        out_of_place=_half_of(result, "out_of_place"),
        in_place=_half_of(result, "in_place"),
    )


def _half_of(result: Json, key: str) -> Half | None:
    half, spread = result.get(key), result.get(f"{key}_per_iter") or {}
    if half is None:
        return None
    is_cpu_time = "cpu_time" in half
    wrong = half.get("nwrong")
    return Half(
        time_us=_float(half["cpu_time" if is_cpu_time else "time"]),
        algbw_gbs=_float(half["alg_bw"]),
        busbw_gbs=_float(half["bus_bw"]),
        num_wrong=None if wrong is None else int(_float(wrong)),
        is_cpu_time=is_cpu_time,
        iter_min_us=spread.get("min_us"),
        iter_max_us=spread.get("max_us"),
        iter_p99_us=spread.get("p99_us"),
        iter_cv_percent=spread.get("cv_pct"),
    )


def _float(value: Any) -> float:
    return math.nan if value == "nan" else float(value)
