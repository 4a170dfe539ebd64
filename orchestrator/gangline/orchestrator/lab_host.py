"""A virtual host of a running lab: programs in it, their pids, and its end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gangline.orchestrator import lab_namespaces
from gangline.orchestrator.errors import LabError
from gangline.orchestrator.lab_links import Link, Network

# Variables of ours that mean another cluster, this process alone, or a way out that hosts lack.
_NOT_PASSED_ON = ("RAY_", "GANGLINE_")
_PROXIES = frozenset(["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"])
_DEATH_TIMEOUT_S = 5.0


class Host:
    """A virtual host: PID, mount, network, UTS and IPC namespaces around an init process.

    It sees the machine's files, but for /proc, /dev/shm (its own), and `scratch` below it.
    """

    def __init__(
        self, name: str, index: int, ips: tuple[str, ...], init_pid: int, network: Network,
        process_inode: int,
    ) -> None:  # fmt: skip
        self.name = name
        self.index = index
        self.ips = ips  # one per plane
        self.init_pid = init_pid  # as this machine sees it
        self.network = network
        self.process_inode = process_inode  # of its PID namespace
        self.scratch = Path(lab_namespaces.SCRATCH)  # inside: a tmpfs of `scratch_mb`, its own
        self.links: tuple[Link, ...] = ()  # one per plane
        self.ray_environment: Mapping[str, str] = {}
        self.services: list[subprocess.Popen[Any]] = []  # run as long as the host does

    def __repr__(self) -> str:
        return f"Host({self.name!r}, {self.ips[0]}, init_pid={self.init_pid})"

    @property
    def is_alive(self) -> bool:
        """Tell whether the host's init process runs."""
        try:
            return lab_namespaces.inode(f"/proc/{self.init_pid}/ns/pid") == self.process_inode
        except OSError:
            return False  # gone, or a zombie, which has no namespaces

    def environment(self) -> dict[str, str]:
        """Return what a process of the host gets: our variables, and those of the lab's Ray."""
        return outer_environment() | self.own_environment()

    def own_environment(self) -> dict[str, str]:
        """Return the variables that the host itself sets."""
        return {"HOSTNAME": self.name, "RAY_TMPDIR": lab_namespaces.SHM, **self.ray_environment}

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> subprocess.Popen[Any]:
        """Start a program in the host; it ends with the host, or when the Popen is killed.

        `env` is the whole environment, by default `environment()`; `cwd` a folder inside the host,
        by default the current one. The Popen is of a small process outside, which passes signals on
        and ends as the program does (127 if it cannot start); the program has a session of its own.
        SIGKILL of the Popen ends the program too; SIGSTOP of it stops nothing else: use
        `outer_pid`.

        Raises: LabError when the host is dead.
        """
        self._check_alive()
        return subprocess.Popen(
            entry_command(self.init_pid, self.process_inode, argv, cwd),
            env=self.environment() if env is None else dict(env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            start_new_session=start_new_session,
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        timeout_s: float | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the host to its end; return its exit code and what it wrote, as text.

        Raises: LabError when the host is dead; subprocess.TimeoutExpired.
        """
        process = self.popen(
            argv, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def pids(self) -> dict[int, int]:
        """Return every process of the host: pid inside -> pid as this machine sees it."""
        found = {}
        for entry in os.scandir("/proc"):
            if not entry.name.isdecimal():
                continue
            try:
                if lab_namespaces.inode(f"{entry.path}/ns/pid") == self.process_inode:
                    found[_inner_pid(entry.path)] = int(entry.name)
            except OSError:
                continue  # it has just ended, or is a zombie
        return found

    def outer_pid(self, inner_pid: int) -> int | None:
        """Return this machine's pid of a process of the host, or None when it is gone."""
        return self.pids().get(inner_pid)

    def path(self, inside: Path | str) -> Path:
        """Return where this machine finds an absolute path of the host."""
        return Path(f"/proc/{self.init_pid}/root") / Path(inside).relative_to("/")

    def kill(self) -> None:
        """End every process of the host at once; its sockets close, so that peers see resets.

        Returns when the last of them is gone, which takes milliseconds.
        """
        with suppress(ProcessLookupError):
            init = os.pidfd_open(self.init_pid)
            try:
                # With the descriptor open the pid cannot become another process's any more.
                if self.is_alive:
                    signal.pidfd_send_signal(init, signal.SIGKILL)
                    select.select([init], [], [], _DEATH_TIMEOUT_S)
            finally:
                os.close(init)

    def power_off(self) -> None:
        """Cut the host off as a loss of power does: nothing of it says goodbye."""
        for link in self.links:
            link.set_carrier(False)
        self.kill()

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise LabError(f"{self.name} is dead; bring the lab down and up again")


def outer_environment() -> dict[str, str]:
    """Return those of our variables that mean something in a host."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_PASSED_ON) and name.upper() not in _PROXIES
    }


def entry_command(
    init_pid: int,
    process_inode: int,
    argv: Sequence[str],
    cwd: Path | str | None = None,
    *,
    in_terminal: bool = False,
) -> list[str]:
    """Return the command that runs a program in a host, given what tells the host.

    `in_terminal` is for a program that shares our terminal, and our process group with it.
    """
    program = [sys.executable, "-I", "-S", lab_namespaces.__file__]
    mode = "terminal" if in_terminal else "session"
    folder = os.path.abspath(cwd or os.getcwd())
    return [*program, "enter", mode, str(init_pid), str(process_inode), folder, *argv]


def _inner_pid(folder: str) -> int:
    with open(f"{folder}/status") as status:
        for line in status:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    raise ProcessLookupError(folder)
