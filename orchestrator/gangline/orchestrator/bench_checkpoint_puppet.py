"""A forked child that saves when it is told to, and strace on its system calls.

strace injects a fault at the n-th call of one kind (`inject=fsync:signal=KILL:when=2`). Its
counters are per thread, so the child saves synchronously, in its one thread, and the calls are
counted from the moment strace was attached, in a first run that is only traced.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gangline.orchestrator.bench_checkpoint_subjects import (
    SaveFailedError,
    Subject,
    end_child,
    fork_child,
)

_CALL = re.compile(r"^\d+ +(\w+)\(")
_BEGIN, _END = "/gangline-bench-begin", "/gangline-bench-end"


@dataclass(frozen=True)
class Call:
    """Name a system call of a save: the `number`-th of its kind since strace was attached."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}#{self.number}"


class Puppet:
    """Hold a child that saves one step at a time."""

    def __init__(self, subject: Subject, root: Path, generation: int) -> None:
        orders_in, self._orders = os.pipe()
        self._answers, answers_out = os.pipe()
        self.pid = fork_child()
        if self.pid == 0:
            os.close(self._orders)
            os.close(self._answers)
            _obey(subject, root, generation, orders_in, answers_out)
        os.close(orders_in)
        os.close(answers_out)
        self._rest = b""
        self.exit_code: int | None = None

    def save(self, step: int) -> str | None:
        """Save; return "" when acknowledged, the reason when refused, None when the child died."""
        self.order(step)
        return self._read_line()

    def order(self, step: int) -> None:
        """Have a step saved without waiting for it."""
        with suppress(BrokenPipeError):  # it has died before; the answer will say so
            os.write(self._orders, b"%d\n" % step)

    def answered(self) -> bool:
        """Tell, without waiting, whether an ordered step has been acknowledged."""
        ready, _, _ = select.select([self._answers], [], [], 0)
        return bool(ready) and self._read_line() == ""

    def _read_line(self) -> str | None:
        while b"\n" not in self._rest:
            block = os.read(self._answers, 4096)
            if not block:
                self._reap()
                return None
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace")

    def _reap(self) -> None:
        if self.exit_code is None:
            self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def end(self) -> int:
        """End the child, unless it has ended; return its exit code, minus the signal if any."""
        os.close(self._orders)
        while self._read_line() is not None:
            continue
        os.close(self._answers)
        assert self.exit_code is not None, "the end of its answers means that it has ended"
        return self.exit_code


def _obey(subject: Subject, root: Path, generation: int, orders: int, answers: int) -> None:
    code = 1
    try:
        session = subject.start(root, generation)
        with os.fdopen(orders, "rb", buffering=0) as lines:
            while line := lines.readline():
                _mark(_BEGIN)
                answer = ""
                try:
                    session.save(int(line))
                except (SaveFailedError, OSError) as error:
                    answer = str(error).replace("\n", " ") or type(error).__name__
                _mark(_END)
                os.write(answers, answer.encode() + b"\n")
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        end_child(code)


def _mark(path: str) -> None:
    os.path.exists(path)  # a call that the trace shows, and nothing else


def missing() -> str | None:
    """Say why strace cannot be used here, and what to do; None where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed; on Debian or Ubuntu: apt-get install strace"
    child = subprocess.Popen(["sleep", "10"])
    try:
        _attach(child.pid, os.devnull, []).terminate()
    except RuntimeError as error:
        return f"strace cannot attach here ({error}); run as root or with CAP_SYS_PTRACE"
    finally:
        child.kill()
        child.wait()
    return None


def _attach(pid: int, log: str | Path, options: list[str]) -> subprocess.Popen[str]:
    command = ["strace", "-f", "-o", str(log), "-p", str(pid), *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None, "a pipe was asked for"
    line = tracer.stderr.readline()
    if "attached" not in line:
        tracer.terminate()
        tracer.wait()
        tracer.stderr.close()
        raise RuntimeError(line.strip() or "strace said nothing")
    return tracer


class Traced:
    """Attach strace to a puppet for as long as the block lasts."""

    def __init__(self, puppet: Puppet, log: Path, options: list[str]) -> None:
        self._puppet, self._log, self._options = puppet, log, options

    def __enter__(self) -> None:
        self._tracer = _attach(self._puppet.pid, self._log, self._options)

    def __exit__(self, *_: object) -> None:
        self._tracer.send_signal(signal.SIGINT)  # detaches; the child goes on
        self._tracer.wait()
        assert self._tracer.stderr is not None, "a pipe was asked for"
        self._tracer.stderr.close()


def calls_of_a_save(puppet: Puppet, step: int, log: Path) -> list[Call]:
    """Trace one save and list its file-system calls in order."""
    with Traced(puppet, log, ["-e", "trace=%file,%desc"]):
        answer = puppet.save(step)
    if answer != "":
        raise RuntimeError(f"the save to be traced was not acknowledged: {answer}")
    counts: Counter[str] = Counter()
    calls: list[Call] = []
    inside = False
    for line in log.read_text(errors="replace").splitlines():
        match = _CALL.match(line)
        if match is None:
            continue
        counts[match[1]] += 1
        if _BEGIN in line or _END in line:
            inside = _BEGIN in line
        elif inside:
            calls.append(Call(match[1], counts[match[1]]))
    return calls
