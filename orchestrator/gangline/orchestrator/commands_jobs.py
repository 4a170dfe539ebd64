"""The commands that look at jobs and steer them: ls, show, logs, events, cancel, wait."""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gangline.orchestrator import api
from gangline.orchestrator.commands_options import Common, JobName
from gangline.orchestrator.display import (
    clock,
    duration,
    log_line,
    printable,
    progress_facts,
    steps,
    summary,
)
from gangline.orchestrator.errors import STATE_EXIT_CODES, ExitCode, UsageError
from gangline.orchestrator.follow import Record

_NUM_LISTED = 20
_WATCH_EVERY_S = 2.0
_COLORS = {
    "RUNNING": 32,
    "SUCCEEDED": 32,
    "FAILED": 31,
    "CANCELLED": 33,
    "RECOVERING": 33,
    "UNKNOWN": 35,
}
Follow = Annotated[
    bool, Parameter(name=["--follow", "-f"], help="Wait for more until the job ends.")
]


def ls(
    *,
    all_: Annotated[
        bool,
        Parameter(name=["--all", "-a"], help=f"Not only the newest {_NUM_LISTED}."),
    ] = False,
    state: Annotated[
        tuple[str, ...],
        Parameter(help="Only jobs in this state, e.g. --state RUNNING; may be repeated."),
    ] = (),
    watch: Annotated[
        bool, Parameter(name=["--watch", "-w"], help="Again every 2 s until Ctrl-C.")
    ] = False,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """List jobs, the newest first, with what they are doing now."""
    states = {name.upper() for name in state}
    while True:
        infos = api.ls(runs=common.runs, limit=None if all_ or states else _NUM_LISTED)
        infos = [info for info in infos if not states or info.state in states]
        if common.json:
            common.data_json({"version": 1, "jobs": [api.to_json(info) for info in infos]})
        else:
            _print_table(infos, common, clear=watch)
        if not watch:
            return ExitCode.OK
        time.sleep(_WATCH_EVERY_S)


def show(
    job: JobName,
    /,
    *,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Show one job: its state and why, progress, workers, and where everything is."""
    info = api.show(job, runs=common.runs)
    if common.json:
        common.data_json({"version": 1, **api.to_json(info)})
        return ExitCode.OK
    rows = {
        "run id": info.run_id,
        "kind": info.kind,
        "state": info.state,
        "reason": info.reason,
        "progress": progress_facts(api.to_json(info)),
        "generation": None if (info.generation or 0) < 0 else info.generation,
        "started": _when(info.created_at),
        "updated": f"{_when(info.updated_at)} ({duration(time.time() - info.updated_at)} ago)",
        "folder": info.run_dir,
        "by": f"{info.user}@{info.host}",
        "cluster": info.address,
        "ray job": info.submission_id,
    }
    for title, value in rows.items():
        if value not in (None, ""):
            common.data(f"{title:<11} {printable(str(value))}")
    if info.kind == "bench":
        from gangline.orchestrator.bench_files import summary_lines

        for line in summary_lines(Path(info.run_dir)):
            common.data(f"{'measured':<11} {printable(line)}")
    if info.workers:
        common.data("")
        cells: list[tuple[str, ...]] = [("rank", "role", "state", "step", "node", "pid")]
        for worker in info.workers:
            cells.append(tuple(_cell(worker.get(title)) for title in cells[0]))
        for line in _columns(cells):
            common.data(line)
    return ExitCode.OK


def logs(
    job: JobName,
    /,
    *,
    follow: Follow = False,
    rank: Annotated[
        tuple[int, ...], Parameter(help="Only this rank's lines; may be repeated.")
    ] = (),
    grep: Annotated[
        str | None, Parameter(help="Only lines in which this regular expression is found.")
    ] = None,
    tail: Annotated[
        int | None, Parameter(name=["--tail", "-n"], help="Only the last N lines so far.")
    ] = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Print what a job's ranks have written, and with -f what they go on to write."""
    pattern = _compiled(grep)
    ranks = frozenset(rank) or None
    if tail is not None and (tail < 0 or follow):
        raise UsageError(
            f"--tail {tail} cannot be used here: it takes a number of lines from 0, without -f"
        )
    found: Iterable[Record] = (
        record
        for record in api.logs(job, runs=common.runs, ranks=ranks, until_end=follow)
        if pattern is None or pattern.search(str(record.get("text")))
    )
    if tail is not None:
        found = deque(found, maxlen=tail)
    one_rank = ranks is not None and len(ranks) == 1
    for record in found:
        if common.json:
            common.data_json(record, indent=None)
        else:
            common.data(printable(str(record.get("text"))) if one_rank else log_line(record))
    return ExitCode.OK


def events(
    job: JobName,
    /,
    *,
    follow: Follow = False,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Print what happened to a job: starts, failures, decisions, recoveries, its end."""
    for record in api.events(job, runs=common.runs, until_end=follow):
        if common.json:
            common.data_json(record, indent=None)
        else:
            generation = f"generation {record.get('generation')}"
            line = f"{record.get('event')}: {record.get('message')}"
            common.data(f"{clock(record.get('time'))}  {generation}  {printable(line)}")
    return ExitCode.OK


def cancel(
    job: JobName,
    /,
    *,
    force: Annotated[bool, Parameter(help="At once, without a last checkpoint.")] = False,
    grace: Annotated[
        float, Parameter(help="Wait so many seconds for the end, then force it.")
    ] = 0.0,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Ask a job to end at its next safe point."""
    info = api.cancel(job, runs=common.runs, force=force, grace_s=grace)
    if common.json:
        common.data_json({"version": 1, **api.to_json(info)})
    elif info.is_terminal:
        common.data(summary(info))
    else:
        common.data(f"{info.run_id}  asked to end")
        common.note(f"wait for it: gangline wait {info.run_id}")
    return ExitCode.OK


def wait(
    job: JobName,
    /,
    *,
    timeout: Annotated[
        float | None, Parameter(help="Give up after so many seconds (exit code 6).")
    ] = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Wait until a job has ended; the exit code tells how."""
    info = api.wait(job, runs=common.runs, timeout_s=timeout)
    if common.json:
        common.data_json({"version": 1, **api.to_json(info)})
    else:
        common.data(summary(info))
    return STATE_EXIT_CODES[info.state]


def _compiled(grep: str | None) -> re.Pattern[str] | None:
    try:
        return None if grep is None else re.compile(grep)
    except re.error as error:
        raise UsageError(f"--grep {grep!r} is not a regular expression: {error}") from None


def _print_table(infos: list[api.JobInfo], common: Common, *, clear: bool) -> None:
    on_terminal = sys.stdout.isatty()
    if clear and on_terminal:
        sys.stdout.write("\x1b[H\x1b[2J")
    if not infos:
        common.note("no jobs; start one with `gangline run FILE`")
        return
    cells: list[tuple[str, ...]] = [("RUN ID", "KIND", "STATE", "STEP", "LOSS", "AGE", "REASON")]
    now_s = time.time()
    for info in infos:
        step = steps(vars(info))
        loss = "" if info.loss is None else f"{info.loss:.3f}"
        age = duration(now_s - info.created_at)
        reason = "" if info.state == "SUCCEEDED" else printable(info.reason)
        cells.append((info.run_id, info.kind, info.state, step, loss, age, reason))
    width = _terminal_width() if on_terminal else None
    for index, line in enumerate(_columns(cells)):
        shown = line if width is None or len(line) <= width else line[: width - 1] + "…"
        if index > 0 and on_terminal and common.wants_color():
            state = cells[index][2]
            colored = f"\x1b[{_COLORS.get(state, 0)}m{state}\x1b[0m"
            shown = shown.replace(f" {state} ", f" {colored} ", 1)
        common.data(shown)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _cell(value: object) -> str:
    return "" if value is None else printable(str(value))


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
