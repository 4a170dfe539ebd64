"""Labs that outlive a command: a keeper in the background, and the file that says where it is.

    start(file, ...) -> LabRecord     a keeper that holds a lab until it is stopped
    records() -> [LabRecord]          every lab of this user
    stop(record)                      end a keeper, or forget one that is dead

The keeper is a process with a session of its own that does `with Lab.up(...)` and waits. A lab's
file holds no secret (tokens are on the hosts' own disks), but stands in a private folder. A keeper
holds a lock on it, so that two labs cannot have one name.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from gangline.orchestrator.cluster import process_start
from gangline.orchestrator.errors import ExitCode, GanglineError, LabError, NotFoundError
from gangline.orchestrator.lab_host import entry_command, outer_environment
from gangline.orchestrator.lab_namespaces import inode

Json = dict[str, Any]
Note = Callable[[str], None]

_STOP_TIMEOUT_S = 15.0
_TICK_S = 0.01


@dataclass(frozen=True)
class HostRecord:
    """What it takes to enter a host from another process."""

    name: str
    ips: list[str]
    init_pid: int
    process_inode: int
    environment: dict[str, str]

    @property
    def is_alive(self) -> bool:
        """Tell whether the host's init process runs."""
        try:
            return inode(f"/proc/{self.init_pid}/ns/pid") == self.process_inode
        except OSError:
            return False


@dataclass(frozen=True)
class LabRecord:
    """What a lab's file says. `ray` is the dashboard's address inside the hosts."""

    name: str
    file: str
    keeper_pid: int
    keeper_start: str
    created_at: float
    is_up: bool = False
    hosts: list[HostRecord] = field(default_factory=list)
    ray: str | None = None

    @property
    def state(self) -> str:
        """Return "starting", "up", or "dead" where the keeper is gone."""
        if process_start(self.keeper_pid) != self.keeper_start:
            return "dead"
        return "up" if self.is_up else "starting"

    def to_json(self) -> Json:
        """Return what `gangline lab ls --json` prints."""
        hosts = [
            {"name": host.name, "ips": host.ips, "init_pid": host.init_pid, "alive": host.is_alive}
            for host in self.hosts
        ]
        values = asdict(self)
        del values["is_up"]
        return {**values, "state": self.state, "hosts": hosts}

    def host(self, name: str) -> HostRecord:
        """Return a host by its name.

        Raises: NotFoundError, LabError when it is dead.
        """
        found = next((host for host in self.hosts if host.name == name), None)
        if found is None:
            names = tuple(host.name for host in self.hosts)
            raise NotFoundError(
                f"no host {name!r} in the lab {self.name}; it has {', '.join(names)}", names
            )
        if not found.is_alive:
            raise LabError(
                f"{name} of the lab {self.name} is dead; bring the lab down and up again"
            )
        return found


def exec_in_host(host: HostRecord, argv: Sequence[str]) -> None:
    """Become a program in a host: this process is replaced.

    Raises: OSError when this cannot start.
    """
    command = entry_command(host.init_pid, host.process_inode, argv, in_terminal=True)
    os.execve(command[0], command, outer_environment() | host.environment)  # noqa: S606 - our own program


def folder() -> Path:
    """Return where labs are written down: a folder of this user alone."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "gangline" / "labs"


def records() -> list[LabRecord]:
    """Return every lab of this user, the newest last; also those whose keeper is dead."""
    found = []
    for path in folder().glob("*.json"):
        with suppress(OSError, ValueError, TypeError, KeyError):
            found.append(_read(path))
    return sorted(found, key=lambda record: record.created_at)


def find(name: str | None) -> LabRecord:
    """Return the lab of a name, or the only one that there is.

    Raises: NotFoundError when there is none, or more than one that it could be.
    """
    known = records()
    if name is not None:
        known = [record for record in known if record.name == name]
    elif len(known) > 1:
        known = [record for record in known if record.state != "dead"] or known
    names = tuple(record.name for record in known or records())
    if not known:
        which = "no lab" if name is None else f"no lab {name!r}"
        there = f"there is {', '.join(names)}" if names else "`gangline lab up FILE` makes one"
        raise NotFoundError(f"{which}; {there}", names)
    if len(known) > 1:
        raise NotFoundError(f"which lab? there are {', '.join(names)}; name one", names)
    return known[0]


def start(file: Path, overrides: Sequence[str], name: str | None, note: Note) -> LabRecord:
    """Start a keeper; return when its lab is up. `note` gets a line per stage.

    Raises: LabError, or the error of a wrong lab file, with what the keeper said.
    """
    from gangline.orchestrator.lab import why_no_lab
    from gangline.orchestrator.lab_file import load_lab

    lab_file = load_lab(file, [*overrides, *([f"name={json.dumps(name)}"] if name else [])])
    why_not = why_no_lab()
    if why_not:
        raise LabError(why_not)
    folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    log = _log_path(lab_file.name)
    request = {"file": str(file.absolute()), "lab": lab_file.model_dump(mode="json")}
    with open(log, "ab") as errors:
        keeper = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert keeper.stdin is not None, "it is a pipe"
    assert keeper.stdout is not None, "it is a pipe"
    try:
        with keeper.stdin as stdin:
            stdin.write(json.dumps(request))
        for line in keeper.stdout:
            said: Json = json.loads(line)
            if "note" in said:
                note(said["note"])
            elif "error" in said:
                raise LabError(said["error"])
            else:
                return find(lab_file.name)
        raise LabError(f"the lab's keeper ended while it came up; see {log}")
    except BaseException:
        keeper.terminate()
        keeper.wait()
        if log.stat().st_size == 0:
            log.unlink()
        raise


def stop(record: LabRecord) -> bool:
    """End a lab and forget it; return False if it was dead already, and only a file was left.

    Raises: LabError when its keeper does not end.
    """
    was_alive = _end(record)
    for path in (_path(record.name), _log_path(record.name), _lock_path(record.name)):
        path.unlink(missing_ok=True)
    return was_alive


def _end(record: LabRecord) -> bool:
    try:
        keeper = os.pidfd_open(record.keeper_pid)
    except ProcessLookupError:
        return False
    try:
        # With the descriptor open the pid cannot become another process's any more.
        if process_start(record.keeper_pid) != record.keeper_start:
            return False
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(keeper, number)
            deadline_s = time.monotonic() + _STOP_TIMEOUT_S
            while time.monotonic() < deadline_s:
                gone = process_start(record.keeper_pid) != record.keeper_start
                if gone and not any(host.is_alive for host in record.hosts):
                    return True
                time.sleep(_TICK_S)
    finally:
        os.close(keeper)
    raise LabError(f"the keeper of {record.name} (pid {record.keeper_pid}) does not end; kill it")


def _path(name: str) -> Path:
    return folder() / f"{name}.json"


def _log_path(name: str) -> Path:
    return folder() / f"{name}.log"


def _lock_path(name: str) -> Path:
    return folder() / f"{name}.lock"


def _read(path: Path) -> LabRecord:
    values = json.loads(path.read_text(encoding="utf-8"))
    return LabRecord(**{**values, "hosts": [HostRecord(**host) for host in values["hosts"]]})


def _write(record: LabRecord) -> None:
    draft = _path(record.name).with_suffix(".draft")
    draft.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
    draft.replace(_path(record.name))


# --- the keeper's own side ------------------------------------------------------------------------


def main() -> int:
    """Hold the lab that stdin asks for until SIGTERM; tell on stdout how it comes up."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _leave)
    os.chdir("/")
    request: Json = json.load(sys.stdin)
    try:
        _keep(request, sys.stdout)
    except GanglineError as error:
        _say(sys.stdout, {"error": str(error)})
        return int(error.exit_code)
    return ExitCode.OK


def _keep(request: Json, out: TextIO) -> None:
    from gangline.orchestrator.lab import Lab
    from gangline.orchestrator.lab_file import LabFile

    lab_file = LabFile.model_validate_json(json.dumps(request["lab"]))
    pid = os.getpid()
    record = LabRecord(
        lab_file.name, request["file"], pid, process_start(pid) or "", created_at=time.time()
    )
    with _name_taken(lab_file.name):
        _write(record)
        with Lab.up(lab_file, log=lambda line: _say(out, {"note": line})) as lab:
            hosts = [
                HostRecord(
                    host.name, list(host.ips), host.init_pid, host.process_inode,
                    host.own_environment(),
                )
                for host in lab.hosts.values()
            ]  # fmt: skip
            ray = lab.ray.address if lab.ray else None
            up = {**record.__dict__, "is_up": True, "hosts": hosts, "ray": ray}
            _write(LabRecord(**up))
            _say(out, {"up_s": lab.up_s})
            signal.pause()


def _leave(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


@contextmanager
def _name_taken(name: str) -> Iterator[None]:
    """Hold the lock of a lab's name, and forget the lab at the end.

    Raises: LabError when a living lab has that name.
    """
    path = _lock_path(name)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between the two lines above its holder may have ended, and removed the file.
            is_ours = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise LabError(
                f"there is a lab {name} already; choose another name with --name, or end that one: "
                f"gangline lab down {name}"
            )
        try:
            yield
        finally:
            _path(name).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def _say(out: TextIO, value: Json) -> None:
    with suppress(OSError):  # nobody listens any more
        print(json.dumps(value), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main())
