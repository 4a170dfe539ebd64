"""The commands about this machine and its tools: doctor, schema."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

from cyclopts import Parameter

from gangline.orchestrator import api
from gangline.orchestrator.commands_options import Common
from gangline.orchestrator.display import printable
from gangline.orchestrator.errors import ExitCode

_MARKS = {"ok": ("ok", 32), "warning": ("warning", 33), "missing": ("MISSING", 31)}


def doctor(
    *,
    address: Annotated[
        str | None, Parameter(help="Check this cluster too, e.g. http://head:8265.")
    ] = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Check Python, packages, memory, disk, limits, GPUs and the cluster; name each mend.

    Ends with 1 when something that every job needs is missing.
    """
    from gangline.orchestrator.doctor import Finding, examine

    findings: list[Finding] = []
    colored = common.wants_color() and sys.stdout.isatty()
    for finding in examine(common.runs or api.DEFAULT_RUNS, address):
        findings.append(finding)
        if common.json or (common.quiet and finding.level == "ok"):
            continue
        word, color = _MARKS[finding.level]
        mark = f"\x1b[{color}m{word:<7}\x1b[0m" if colored else f"{word:<7}"
        common.data(f"{mark}  {finding.check:<12}  {printable(finding.found)}")
        if finding.mend:
            common.data(f"{'':<23}  -> {printable(finding.mend)}")
    healthy = all(finding.level != "missing" for finding in findings)
    if common.json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        common.data_json({"version": 1, "healthy": healthy, "checks": checks})
    return ExitCode.OK if healthy else ExitCode.ERROR


def schema(
    *,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Print the JSON Schema of job files; an editor that knows it completes and checks them.

    Save it and begin a job file with: # yaml-language-server: $schema=FILE
    """
    common.data_json(api.schema())
    return ExitCode.OK
