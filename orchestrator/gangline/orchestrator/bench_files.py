"""Where the results of a `kind: bench` job lie in its run folder, and what they come to in words.

    artifacts/bench.txt     the tables, as they were printed
    artifacts/bench.json    nccl-tests' JSON of the operation; a list of them if there were several

With `bench.implementation: nccl-tests` every worker measures its own GPUs: those of rank R beyond
0 are in bench-rank-R.txt and .json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gangline.monitoring.nccl_tests import NcclReport, parse_reports
from gangline.orchestrator.plan_fit import bytes_text

Json = dict[str, Any]


def table_path(run_dir: Path, rank: int = 0) -> Path:
    """Return the file of the tables."""
    return run_dir / "artifacts" / f"bench{_suffix(rank)}.txt"


def json_path(run_dir: Path, rank: int = 0) -> Path:
    """Return the file of the JSON."""
    return run_dir / "artifacts" / f"bench{_suffix(rank)}.json"


def _suffix(rank: int) -> str:
    return f"-rank-{rank}" if rank else ""


class TableFile:
    """Write the tables of one run, line by line, where others read them meanwhile."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)

    def write(self, text: str) -> None:
        """Append text; a reader sees it at once."""
        os.write(self._fd, text.encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def write_documents(path: Path, documents: list[Json]) -> None:
    """Write the JSON of one or several operations, in one step."""
    if not documents:
        return  # an old binary knows no -J
    draft = path.with_name(f".{path.name}")
    draft.write_text(dump_documents(documents), encoding="utf-8")
    draft.replace(path)


def dump_documents(documents: list[Json]) -> str:
    """Return the JSON of one operation, or of several as a list."""
    return json.dumps(documents[0] if len(documents) == 1 else documents, indent=1) + "\n"


def read_documents(path: Path) -> list[Json]:
    """Return what `write_documents` wrote; [] if it is not there."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    return found if isinstance(found, list) else [found]


def summary_lines(run_dir: Path) -> list[str]:
    """Return one line per operation that a run has measured; [] while there is none to be seen."""
    lines = []
    for path in sorted((run_dir / "artifacts").glob("bench*.txt")):
        rank = path.stem.removeprefix("bench").strip("-").replace("-", " ")
        reports = parse_reports(path.read_text(encoding="utf-8", errors="replace"))
        lines += [(f"{rank}: " if rank else "") + _summary(report) for report in reports]
    return lines


def _summary(report: NcclReport) -> str:
    sizes = [row.size_bytes for row in report.rows]
    text = f"{report.operation or 'an operation'}"
    if sizes:
        text += f", {bytes_text(min(sizes))} to {bytes_text(max(sizes))}"
    if report.busbw_gbs is None:
        return f"{text}: not finished"
    if report.num_failed:
        verdict = f"WRONG VALUES in {report.num_failed} measurements"
    else:
        verdict = "TOO SLOW" if report.is_fast is False else "values right"
    return f"{text}: average bus bandwidth {report.busbw_gbs:g} GB/s, {verdict}"
