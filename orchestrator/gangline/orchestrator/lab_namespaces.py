"""The small programs that hold a lab together, and the system calls that they need.

    lab_namespaces.py anchor CONFIG     makes the namespaces and holds them until its keeper ends
    lab_namespaces.py probe             tells whether this machine lets us do that
    lab_namespaces.py enter MODE PID INODE CWD PROGRAM...     runs a program in a host

The anchor is the parent of one init process per host, which is process 1 in namespaces of its own
(PID, mount, network, UTS, IPC), and holds a file descriptor of each switch's network namespace.
Nothing has a name in a file system. When the keeper ends, in whatever way, the anchor sees it and
ends; were the anchor killed, the kernel would kill each init, and with it all of its host; and a
network namespace that no process and no descriptor holds is removed with its links.

They run with `python -I -S`, and so this file imports nothing but the standard library, and of that
only what starts fast: each program that runs in a host waits for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

NEWNS, NEWUTS, NEWIPC = 0x00020000, 0x04000000, 0x08000000
NEWPID, NEWNET = 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG = 1
_SI_KERNEL = 0x80

SHM = "/dev/shm"  # noqa: S108 - a mount of the host's own
SCRATCH = f"{SHM}/scratch"
"""Where a host has its small disk: a tmpfs of its own below its /dev/shm."""
_HOSTS_FILE = f"{SHM}/.hosts"
# What of /sys shows a network namespace; the rest of /sys is the machine's.
_SYS_NET = ("class/net", "devices/virtual/net")

_NUM_CANNOT_START = 127  # as a shell has it

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def setns(fd: int, flags: int) -> None:
    """Move this thread into a namespace."""
    _check(_libc.setns(fd, flags), "setns")


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = source.encode(), target.encode(), kind and kind.encode()
    done = _libc.mount(*texts, ctypes.c_ulong(flags), data.encode())
    _check(done, f"mount {kind or 'bind'} on {target}")


def _end_with_parent() -> None:
    """Ask the kernel for SIGKILL when the thread that started this process ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "prctl")


def inode(path: str | int) -> int:
    """Return what tells one namespace from another."""
    return os.stat(path).st_ino


# --- anchor ---------------------------------------------------------------------------------------


def _anchor(config: dict[str, Any]) -> int:
    """Make every namespace, tell the keeper, and hold them until it ends.

    stdout carries one line of JSON, `{"hosts": ..., "switches": ...}` or `{"error": ...}`; stdin
    is silent and open as long as the keeper wants the lab.
    """
    keeper = config["keeper_pid"]
    if config["started_by_main_thread"]:
        _end_with_parent()
    watch = os.pidfd_open(keeper)
    if os.getppid() != keeper:
        return 1
    signal.signal(signal.SIGCHLD, lambda *_: None)
    inits: dict[str, int] = {}
    try:
        switches = _make_switches(config["switches"])
        inits = _make_hosts(config)
        made = {
            name: {
                "pid": pid,
                "net": inode(f"/proc/{pid}/ns/net"),
                "processes": inode(f"/proc/{pid}/ns/pid"),
            }
            for name, pid in inits.items()
        }
        _answer({"hosts": made, "switches": switches})
        _wait_for_end(watch, inits)
    except OSError as error:
        _answer({"error": error.strerror or str(error)})
        return 1
    finally:
        _end(inits)
    return 0


def _answer(value: dict[str, Any]) -> None:
    import json

    print(json.dumps(value), flush=True)


def _make_switches(names: list[str]) -> dict[str, dict[str, int]]:
    """Return a descriptor of a new network namespace for each name."""
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    switches = {}
    for name in names:
        _unshare(NEWNET)
        fd = os.open("/proc/self/ns/net", os.O_RDONLY)
        switches[name] = {"fd": fd, "net": inode(fd)}
    setns(here, NEWNET)
    os.close(here)
    return switches


def _make_hosts(config: dict[str, Any]) -> dict[str, int]:
    """Start the init of each host, all at once; return their pids when all are ready.

    Raises: OSError with what the first one that failed could not do.
    """
    ours = os.open("/proc/self/ns/pid", os.O_RDONLY)
    reports, report_to = os.pipe()
    inits = {}
    for name in config["hosts"]:
        _unshare(NEWPID)  # for the next child only: then back
        pid = os.fork()
        if pid == 0:
            os.close(reports)
            _be_init(name, config, report_to)
        inits[name] = pid
        setns(ours, NEWPID)
    os.close(ours)
    os.close(report_to)
    text = b""
    while chunk := os.read(reports, 4096):
        text += chunk
    os.close(reports)
    ready = text.decode().splitlines()
    failed = [line for line in ready if line]
    if failed or len(ready) < len(inits):
        _end(inits)
        raise OSError(failed[0] if failed else "a host's init process died")
    return inits


def _wait_for_end(watch: int, inits: dict[str, int]) -> None:
    """Wait until the keeper says so or dies; reap and forget hosts that die meanwhile."""
    import select

    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(watch, select.POLLIN)
    # A SIGCHLD interrupts the wait only where a handler writes to a descriptor.
    wake, wake_to = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_to)
    poll.register(wake, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if watch in ready or 0 in ready:
            return
        if wake in ready:
            os.read(wake, 4096)
            for name, pid in list(inits.items()):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del inits[name]  # its pid may soon be another process's


def _end(inits: dict[str, int]) -> None:
    """Kill hosts and wait until nothing of them runs: an init is the last of its host to go."""
    for pid in inits.values():
        os.kill(pid, signal.SIGKILL)
    for pid in inits.values():
        os.waitpid(pid, 0)


def _be_init(name: str, config: dict[str, Any], report_to: int) -> NoReturn:
    """Be process 1 of a host: set it up, say so, then reap whatever dies in it."""
    import socket

    try:
        _end_with_parent()
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        _unshare(NEWNET | NEWNS | NEWUTS | NEWIPC)
        socket.sethostname(name)
        _mount_all(config)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.closerange(3, report_to)
        os.write(report_to, b"\n")
        os.closerange(report_to, report_to + 64)
        while True:
            signal.sigwait([signal.SIGCHLD])
            _reap()
    except OSError as error:
        os.write(report_to, f"{name}: {error.strerror}\n".encode())
    finally:
        os._exit(1)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass  # none left


def _mount_all(config: dict[str, Any]) -> None:
    """Give the host its own /proc, /dev/shm, scratch disk, /etc/hosts and view of the network.

    Everything else is the machine's, at the same paths.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    hidden = _MS_NOSUID | _MS_NODEV
    _mount("proc", "/proc", "proc", hidden | _MS_NOEXEC)
    # An intermediate place for a sysfs of this network; /dev/shm covers it in a moment.
    _mount("sysfs", SHM, "sysfs", hidden | _MS_NOEXEC)
    for folder in _SYS_NET:
        if os.path.isdir(f"/sys/{folder}"):
            _mount(f"{SHM}/{folder}", f"/sys/{folder}", None, _MS_BIND)
    _mount("tmpfs", SHM, "tmpfs", hidden, "mode=1777")
    os.mkdir(SCRATCH)
    _mount("tmpfs", SCRATCH, "tmpfs", hidden, f"mode=1777,size={config['scratch_bytes']}")
    if os.path.exists("/etc/hosts"):
        with open("/etc/hosts", errors="replace") as theirs, open(_HOSTS_FILE, "w") as ours:
            ours.write(config["etc_hosts"] + theirs.read())
        _mount(_HOSTS_FILE, "/etc/hosts", None, _MS_BIND)


def _probe() -> int:
    """Try what an init will do, in namespaces that end with this process."""
    try:
        _unshare(NEWNET | NEWNS | NEWUTS | NEWIPC | NEWPID)
        _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
        _mount("tmpfs", SHM, "tmpfs", _MS_NOSUID)
    except OSError as error:
        print(error.strerror)
        return 1
    return 0


# --- enter ----------------------------------------------------------------------------------------


def _enter(mode: str, init_pid: int, processes: int, cwd: str, argv: list[str]) -> int:
    """Run a program in a host and end as it does; pass signals on to it.

    `mode` "terminal" leaves the program in our process group, where a terminal's signals reach it
    by themselves; "session" gives it a session of its own, so that it gets each signal once even
    where one is sent to our whole group. `processes` is the inode of the host's PID namespace, so
    that a later process with the pid of a dead init is not mistaken for it.
    """
    # In the C locale Python sets LC_CTYPE for itself, and for what it starts.
    with open("/proc/self/environ", "rb") as given:
        if not any(variable.startswith(b"LC_CTYPE=") for variable in given.read().split(b"\0")):
            os.environ.pop("LC_CTYPE", None)
    try:
        host = os.pidfd_open(init_pid)
        if inode(f"/proc/{init_pid}/ns/pid") != processes:
            raise ProcessLookupError
        setns(host, NEWNET | NEWNS | NEWUTS | NEWIPC | NEWPID)
    except OSError as error:
        print(f"cannot enter the host: it is dead ({error})", file=sys.stderr)
        return _NUM_CANNOT_START
    passed_on = set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}
    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on - faults)
    child = os.fork()
    if child == 0:
        _start(argv, cwd, before, own_session=mode == "session")
    while True:
        received = signal.sigwaitinfo(passed_on - faults)
        if received.si_signo == signal.SIGCHLD:
            status = _status_of(child, mode)
            if status is not None:
                return status
        elif mode == "session" or received.si_code != _SI_KERNEL:
            os.kill(child, received.si_signo)


def _start(argv: list[str], cwd: str, mask: set[int], *, own_session: bool) -> NoReturn:
    try:
        _end_with_parent()
        # The parent is outside our PID namespace, and so is always process 0 here; were it dead,
        # init would have become our parent.
        if os.getppid() == 1:
            os._exit(1)
        if own_session:
            os.setsid()
        os.chdir(cwd)
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvp(argv[0], argv)  # noqa: S606 - the caller's own program
    except OSError as error:
        os.write(2, f"cannot run {argv[0]} in the host: {error}\n".encode())
    finally:
        os._exit(_NUM_CANNOT_START)


def _status_of(child: int, mode: str) -> int | None:
    """Return the exit status of the program, None while it lives.

    In a terminal be stopped when it is, for the shell; it goes on with our whole group.
    """
    pid, status = os.waitpid(child, os.WNOHANG | (os.WUNTRACED if mode == "terminal" else 0))
    if pid == 0:
        return None
    if os.WIFSTOPPED(status):
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    if os.WIFSIGNALED(status):
        # End by the same signal, so that a Popen shows what happened, without a core of ours.
        number = os.WTERMSIG(status)
        _libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    if sys.argv[1] == "anchor":
        import json

        sys.exit(_anchor(json.loads(sys.argv[2])))
    if sys.argv[1] == "probe":
        sys.exit(_probe())
    sys.exit(_enter(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6:]))
