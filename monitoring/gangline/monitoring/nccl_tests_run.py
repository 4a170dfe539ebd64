"""Run NVIDIA's nccl-tests binaries: find one, build its arguments, run it, read what it says.

The arguments are built from checked settings and given as a list; no shell sees them. A flag is
given only where it differs from the binary's default, so that old versions, which know fewer, run
too. The binary is ended with all it started when the run is stopped, and with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gangline.monitoring.comm_bench_config import CommBenchConfig
from gangline.monitoring.nccl_tests import (
    NcclReport,
    NcclTestsFormatError,
    load_document,
    parse_json,
    parse_reports,
    redact_document,
)

Json = dict[str, Any]

_SUFFIXES = ("_perf", "_perf_mpi")
_HELP_TIMEOUT_S = 20.0
_LOOK_EVERY_S = 0.2
_END_GRACE_S = 5.0
# Before it becomes the binary, the child asks the kernel to be killed with its parent (prctl
# option 1 is PR_SET_PDEATHSIG): a worker that is killed leaves no binary on its GPUs.
_LAUNCH = (
    "import ctypes, os, sys; "
    "ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)


class NcclTestsError(RuntimeError):
    """A binary is missing, does not know a flag, or failed without a report."""


@dataclass(frozen=True)
class NcclRun:
    """What a binary printed, and what it means. `document` is its JSON, redacted, if it wrote any.

    `exit_code` is what it ended with; -N for the signal N.
    """

    operation: str
    command: list[str]
    exit_code: int
    text: str
    report: NcclReport
    document: Json | None

    def sentence(self) -> str:
        """Say in one line what is wrong, or what was measured."""
        report = self.report
        if not report.is_complete:
            said = "; ".join(report.errors) or "no footer"
            return f"{self.operation}: exit code {self.exit_code} before its end ({said})"
        found = f"{self.operation}: average bus bandwidth {report.busbw_gbs:g} GB/s"
        if report.num_failed:
            return f"{found}, wrong values in {report.num_failed} measurements"
        if report.is_fast is False:
            return f"{found}, less than 9/10 of bench.min_busbw_gbs"
        return found if self.exit_code == 0 else f"{found}, exit code {self.exit_code}"


def find_binary(operation: str, folder: Path | str | None, path: str) -> Path:
    """Return the binary of an operation: in `folder`, or on `path` where that is None.

    Raises: NcclTestsError, with the mend.
    """
    places = str(folder) if folder is not None else path
    for suffix in _SUFFIXES:
        found = shutil.which(operation + suffix, path=places)
        if found is not None:
            return Path(found).absolute()
    where = f"in {folder}" if folder is not None else "on PATH"
    raise NcclTestsError(
        f"{operation}_perf is not {where}; build github.com/NVIDIA/nccl-tests and set "
        "bench.binaries to its build folder"
    )


def arguments(
    config: CommBenchConfig, *, num_threads: int, num_gpus: int, json_file: Path | None
) -> list[str]:
    """Return the arguments of a binary; `num_gpus` is per thread."""
    flags = ["-t", str(num_threads)] if num_threads != 1 else []
    flags += ["-g", str(num_gpus), *config.flags()]
    return flags + (["-J", str(json_file)] if json_file is not None else [])


def known_flags(binary: Path) -> frozenset[str]:
    """Return the flags that a binary knows, as its help says.

    Raises: NcclTestsError when it cannot be started.
    """
    try:
        shown = subprocess.run(
            [str(binary), "-h"],
            capture_output=True,
            text=True,
            timeout=_HELP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NcclTestsError(
            f"{binary} cannot be started: {error}; build it for this machine"
        ) from error
    found = frozenset(re.findall(r"\[(-[A-Za-z]),--", shown.stdout + shown.stderr))
    if not found:
        last = (shown.stderr or shown.stdout).strip().splitlines()[-1:]
        raise NcclTestsError(
            f"{binary} -h does not print nccl-tests' help ({''.join(last)[:200] or 'nothing'}); "
            "build it for this machine, or set LD_LIBRARY_PATH to where libnccl is"
        )
    return found


def run_binary(
    operation: str,
    config: CommBenchConfig,
    *,
    num_threads: int,
    num_gpus: int,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> NcclRun:
    """Run the binary of one operation to its end.

    `environment` is what it gets, with PATH; `on_line` gets every line it prints, with its end,
    as it comes; `on_progress` is called a few times a second while it runs.

    Raises: NcclTestsError when it is not there, does not know a flag that was asked for, or ends
    without a report.
    """
    binary = find_binary(operation, config.binaries, environment.get("PATH", os.defpath))
    known = known_flags(binary)
    env = dict(environment)
    if config.min_busbw_gbs is not None:
        env["NCCL_TESTS_MIN_BW"] = repr(config.min_busbw_gbs)
    with tempfile.TemporaryDirectory(prefix="gangline-nccl-tests-") as scratch:
        json_file = Path(scratch) / "report.json" if "-J" in known else None
        flags = arguments(config, num_threads=num_threads, num_gpus=num_gpus, json_file=json_file)
        unknown = [flag for flag in flags if re.fullmatch(r"-[A-Za-z]", flag) and flag not in known]
        if unknown:
            raise NcclTestsError(
                f"{binary} is too old for {' '.join(unknown)}; leave out the setting of bench that "
                "stands for it, or build a newer version"
            )
        command = [str(binary), *flags]
        code, text = _run(command, env, on_line, on_progress, should_stop)
        document = _read_json(json_file)
    report = _merge(parse_reports(text), document)
    if report is None:
        last = [line for line in text.splitlines() if line.strip()][-1:]
        raise NcclTestsError(
            f"{binary.name} ended with exit code {code} and no table; it said: "
            f"{''.join(last)[:300] or 'nothing'}"
        )
    report.operation = report.operation or operation
    kept = redact_document(document) if document is not None else None
    return NcclRun(operation, command, code, text, report, kept)


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    on_line: Callable[[str], None],
    on_progress: Callable[[], None],
    should_stop: Callable[[], bool],
) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )
    assert process.stdout is not None, "made with a pipe"
    lines: list[str] = []
    rest = b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                ready = selector.select(_LOOK_EVERY_S)
                on_progress()
                if should_stop():
                    os.killpg(process.pid, signal.SIGTERM)
                    break
                if not ready:
                    continue
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                *whole, rest = (rest + chunk).split(b"\n")
                if not chunk and rest:
                    whole, rest = [rest], b""
                for line in whole:
                    lines.append(line.decode(errors="replace") + "\n")
                    on_line(lines[-1])
                if not chunk:
                    break
    finally:
        _end_group(process)
    return process.returncode, "".join(lines)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Give the binary a moment to end, then end it and all that it started."""
    deadline_s = time.monotonic() + _END_GRACE_S
    while process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _read_json(json_file: Path | None) -> Json | None:
    if json_file is None or not json_file.exists():
        return None
    try:
        return load_document(json_file.read_text(encoding="utf-8", errors="replace"))
    except NcclTestsFormatError:
        return None  # it was killed while it wrote; the table says as much


def _merge(reports: Sequence[NcclReport], document: Json | None) -> NcclReport | None:
    """Return the report: figures from the JSON, which has more digits, the rest from the text."""
    printed = reports[-1] if reports else None
    if document is None:
        return printed
    try:
        exact = parse_json(json.dumps(document))
    except NcclTestsFormatError:
        return printed
    if printed is not None:
        exact.version = printed.version
        exact.operation = printed.operation or exact.operation
    return exact
