"""The commands that start a job: run, submit, plan, resume."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import Parameter

from gangline.orchestrator import api
from gangline.orchestrator.commands_options import Common, JobName, Overrides
from gangline.orchestrator.display import Display, make_display
from gangline.orchestrator.errors import STATE_EXIT_CODES, ExitCode
from gangline.orchestrator.follow import Record

File = Annotated[Path, Parameter(help="The job file (YAML).")]
Name = Annotated[str | None, Parameter(help="Name of the job; its run id begins with it.")]
TokenFile = Annotated[
    Path | None,
    Parameter(
        help="File with the cluster's token. Without it RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, "
        "~/.ray/auth_token."
    ),
]
Logs = Annotated[
    bool | None,
    Parameter(
        name="--logs",
        negative="--no-logs",
        help="Show the ranks' log lines; by default those of a script.",
    ),
]


def run(
    file: File,
    /,
    *,
    overrides: Overrides = (),
    name: Name = None,
    address: Annotated[
        str | None, Parameter(help="Ray cluster to use (HOST:PORT or auto); else a private one.")
    ] = None,
    logs: Logs = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Run a job here until it ends.

    Ctrl-C stops it at the next safe point, a second Ctrl-C at once.
    """
    session = _RunSession(common, logs)
    with session.stopped_by_signals():
        info = api.run(
            file,
            overrides=overrides,
            name=name,
            address=address,
            runs=common.runs,
            watcher=session.watcher(),
            stop=session.stop,
        )
    return session.end(info)


def resume(
    job: JobName,
    /,
    *,
    overrides: Overrides = (),
    follow: Annotated[
        bool,
        Parameter(
            name=["--follow", "-f"],
            negative=["--detach", "-d"],
            help="Of a submitted job: follow it until it ends, or return at once.",
        ),
    ] = True,
    logs: Logs = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Go on with a job that ended, from its newest committed step.

    A `run` goes on here; a submitted job is sent to its cluster again.
    """
    if api.show(job, runs=common.runs).mode == "submit":
        watcher = api.Watcher(on_note=common.note)
        info = api.resume(job, overrides=overrides, runs=common.runs, watcher=watcher)
        return _after_submission(info, follow, logs, common)
    session = _RunSession(common, logs)
    with session.stopped_by_signals():
        info = api.resume(
            job,
            overrides=overrides,
            runs=common.runs,
            watcher=session.watcher(),
            stop=session.stop,
        )
    return session.end(info)


def submit(
    file: File,
    /,
    *,
    overrides: Overrides = (),
    name: Name = None,
    address: Annotated[
        str | None,
        Parameter(
            help="The cluster's dashboard, e.g. http://head:8265. Without it cluster.address of "
            "the file, then RAY_API_SERVER_ADDRESS, then this machine."
        ),
    ] = None,
    token_file: TokenFile = None,
    python: Annotated[
        str | None, Parameter(help="Python of the cluster; by default what its head runs with.")
    ] = None,
    follow: Annotated[
        bool,
        Parameter(
            name=["--follow", "-f"],
            negative=["--detach", "-d"],
            help="Follow the job until it ends (Ctrl-C detaches), or return at once.",
        ),
    ] = True,
    logs: Logs = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Send a job to a Ray cluster.

    Its run folder is made there: storage.root must be a folder that every node sees.
    """
    info = api.submit(
        file,
        overrides=overrides,
        name=name,
        address=address,
        token_file=token_file,
        python=python,
        runs=common.runs,
        watcher=api.Watcher(on_note=common.note),
    )
    return _after_submission(info, follow, logs, common)


def plan(
    file: File,
    /,
    *,
    overrides: Overrides = (),
    name: Name = None,
    address: Annotated[
        str | None, Parameter(help="Also check whether it fits this cluster: http://head:8265.")
    ] = None,
    token_file: TokenFile = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Show what a job would do: layout, memory, bytes, files to upload. Changes nothing."""
    planned = api.plan(file, overrides=overrides, name=name, address=address, token_file=token_file)
    if common.json:
        common.data_json(planned.to_json())
    else:
        common.data(planned.render())
    return ExitCode.OK


class _RunSession:
    """The terminal's side of a `run`: its display, and the signals that stop it."""

    def __init__(self, common: Common, with_logs: bool | None) -> None:
        self._common, self._with_logs = common, with_logs
        self._display: Display | None = None
        self._num_signals = 0
        self._was_ctrl_c = False
        self.stop = api.Stop.unasked()

    def watcher(self) -> api.Watcher:
        """Return who shows what the job tells."""
        return api.Watcher(on_start=self._start, on_record=self._record, on_note=self._common.note)

    def _start(self, info: api.JobInfo) -> None:
        self._display = open_display(self._common, self._with_logs, info)

    def _record(self, record: Record) -> None:
        assert self._display is not None, "a run starts before it has records"
        self._display.show(record)

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Turn SIGINT, SIGTERM and SIGHUP into a graceful stop, the second one into a hard one."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        except BaseException:
            if self._display is not None:
                self._display.end(None)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        self._was_ctrl_c = self._was_ctrl_c or number == signal.SIGINT
        if self._display is None or self._num_signals > 2:
            raise KeyboardInterrupt
        if self._num_signals == 1:
            self.stop.gracefully.set()
            self._common.note("stopping at the next safe point; once more stops at once")
        else:
            self.stop.now.set()
            self._common.note("stopping at once")

    def end(self, info: api.JobInfo) -> int:
        """Show how the job ended and return the exit code."""
        assert self._display is not None, "a run that ended has started"
        self._display.end(info)
        if info.state != "SUCCEEDED":
            self._common.note(
                f"logs: gangline logs {info.run_id}; go on: gangline resume {info.run_id}"
            )
        return ExitCode.INTERRUPTED if self._was_ctrl_c else STATE_EXIT_CODES[info.state]


def _after_submission(
    info: api.JobInfo, follow: bool, with_logs: bool | None, common: Common
) -> int:
    """Print the run id, and follow the job if that is wanted; Ctrl-C detaches."""
    hint = f"follow: gangline logs -f {info.run_id}; stop: gangline cancel {info.run_id}"
    if not follow:
        if common.json:
            common.data_json(api.to_json(info))
        else:
            common.data(info.run_id)
        common.note(hint)
        return ExitCode.OK
    common.note(f"submitted {info.run_id} to {info.address} (Ctrl-C detaches)")
    display = open_display(common, with_logs, info)
    ended: api.JobInfo | None = None
    try:
        for record in api.follow(info.run_id, runs=common.runs):
            display.show(record)
        ended = api.show(info.run_id, runs=common.runs)
    except KeyboardInterrupt:
        display.end(None)
        common.note(f"{info.run_id} is still running; {hint}")
        return ExitCode.INTERRUPTED
    except BaseException:
        display.end(None)
        raise
    display.end(ended)
    return STATE_EXIT_CODES[ended.state]


def open_display(common: Common, with_logs: bool | None, info: api.JobInfo) -> Display:
    """Return the display for a job; where records are JSON, tell the job first."""
    display = make_display(
        as_json=common.json,
        quiet=common.quiet,
        color=common.wants_color(),
        with_logs=info.kind == "script" if with_logs is None else with_logs,
    )
    if common.json:
        common.data_json({"type": "start", **api.to_json(info)}, indent=None)
    else:
        common.note(f"{info.run_id} writes to {info.run_dir}")
    return display
