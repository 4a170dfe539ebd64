"""Check whether this machine can run Gangline: one finding per check, with the mend.

A finding is `ok`, a `warning` (something will be slower, or missing for some jobs) or `missing`
(jobs will not run). Heavy packages are imported in processes of their own with a time-out, so that
a broken one cannot take the doctor with it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from gangline.orchestrator.doctor_finding import Finding, Level
from gangline.orchestrator.doctor_machine import gpu_findings, lab_findings

__all__ = ["Finding", "examine"]

_MIN_PYTHON = (3, 11)
_IMPORT_TIMEOUT_S = 60.0
# Imported by every job; the others belong to rooms that a job may not use.
_REQUIRED_IMPORTS = ("torch", "ray", "mlflow")
_MIN_MEMORY_BYTES = 4 * 2**30
_MIN_SHM_BYTES = 256 * 2**20
_SHM = "/dev/shm"  # noqa: S108 - looked at, not written
_MIN_DISK_BYTES = 2 * 2**30
_MIN_OPEN_FILES = 4096


def examine(runs: Path, address: str | None = None) -> Iterator[Finding]:
    """Yield the findings about this machine, its packages, and the cluster if one is named.

    `runs` is where run folders would go; `address` a cluster's dashboard.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _imports,
        _processor_and_memory,
        lambda: _disk(runs),
        _limits,
        _ports,
        lab_findings,
        gpu_findings,
        lambda: _cluster(address),
    )
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    found = platform.python_version()
    if sys.version_info < _MIN_PYTHON:
        wanted = ".".join(map(str, _MIN_PYTHON))
        yield Finding("python", "missing", found, f"use Python {wanted} or newer")
    else:
        yield Finding("python", "ok", f"{found}, {sys.executable}")


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what Gangline's own metadata asks for."""
    from packaging.requirements import Requirement

    try:
        asked = importlib.metadata.requires("gangline") or []
    except importlib.metadata.PackageNotFoundError:
        mend = "install it: pip install -e ."
        yield Finding("packages", "missing", "gangline itself is not installed", mend)
        return
    wrong = []
    num_right = 0
    for line in asked:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} (wanted {requirement.specifier or 'any'})")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            num_right += 1
        else:
            wrong.append(f"{requirement.name} {version} (wanted {requirement.specifier})")
    if wrong:
        mend = "pip install -e . in Gangline's checkout, or pip install --upgrade gangline"
        yield Finding("packages", "missing", ", ".join(wrong), mend)
    else:
        yield Finding("packages", "ok", f"all {num_right} as wanted")


def _imports() -> Iterator[Finding]:
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", f"import {name}; print({name}.__version__)"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in _REQUIRED_IMPORTS
    }
    for name, process in processes.items():
        try:
            out, err = process.communicate(timeout=_IMPORT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found = f"still importing after {_IMPORT_TIMEOUT_S:.0f} s"
            yield Finding(name, "missing", found, "look for a hanging network disk; then reinstall")
            continue
        if process.returncode == 0:
            yield Finding(name, "ok", f"version {out.strip()}")
        else:
            lines = err.strip().splitlines() or [f"exit code {process.returncode}"]
            yield Finding(name, "missing", lines[-1], f"pip install --force-reinstall {name}")


def _processor_and_memory() -> Iterator[Finding]:
    import psutil

    num_cores = len(os.sched_getaffinity(0))
    level: Level = "ok" if num_cores >= 2 else "warning"
    mend = "jobs with several workers share one core" if num_cores < 2 else ""
    yield Finding("cpu cores", level, str(num_cores), mend)
    memory = psutil.virtual_memory()
    enough = memory.available >= _MIN_MEMORY_BYTES
    yield Finding(
        "memory",
        "ok" if enough else "warning",
        f"{_gib(memory.available)} free of {_gib(memory.total)}",
        "" if enough else f"close other programs, or use fewer workers (each takes {_gib(2**30)})",
    )
    shared = Path(_SHM)
    if not shared.is_dir():
        yield Finding(_SHM, "warning", "not there", "Ray keeps objects on disk: slower")
        return
    size = shutil.disk_usage(shared).total
    enough = size >= _MIN_SHM_BYTES
    mend = "" if enough else "in a container: docker run --shm-size=1g"
    yield Finding(_SHM, "ok" if enough else "warning", _gib(size), mend)


def _disk(runs: Path) -> Iterator[Finding]:
    runs = runs.absolute()
    place = next(folder for folder in (runs, *runs.parents) if folder.is_dir())
    if not os.access(place, os.W_OK):
        mend = f"choose another place with --runs, or make {place} writable"
        yield Finding("runs folder", "missing", f"{place} cannot be written to", mend)
        return
    free = shutil.disk_usage(place).free
    enough = free >= _MIN_DISK_BYTES
    yield Finding(
        "runs folder",
        "ok" if enough else "warning",
        f"{runs}, {_gib(free)} free",
        "" if enough else "checkpoints need room: free some, or choose another place with --runs",
    )


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= _MIN_OPEN_FILES
    mend = "" if enough else f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
    yield Finding("open files", "ok" if enough else "warning", f"at most {soft}", mend)


def _ports() -> Iterator[Finding]:
    """Ray and the ranks listen on ports that the kernel picks; see that it gives some."""
    try:
        sockets = [socket.socket() for _ in range(16)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        for each in sockets:
            each.close()
    except OSError as error:
        mend = "raise net.ipv4.ip_local_port_range, or look at what holds so many ports"
        yield Finding("ports", "missing", f"no free port on 127.0.0.1: {error}", mend)
    else:
        yield Finding("ports", "ok", "free ones on 127.0.0.1")


def _cluster(address: str | None) -> Iterator[Finding]:
    from gangline.orchestrator.errors import GanglineError
    from gangline.orchestrator.jobs_rest import JobsRest, find_address, find_token

    if address is None and "RAY_API_SERVER_ADDRESS" not in os.environ:
        yield Finding("cluster", "ok", "none configured; `run` starts a private Ray")
        return
    try:
        rest = JobsRest(find_address(address), find_token(None))
        version, here = rest.version(), importlib.metadata.version("ray")
        nodes = rest.node_resources()
    except GanglineError as error:
        what, _, mend = str(error).partition("; ")
        yield Finding("cluster", "missing", what, mend)
        return
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    found = f"{rest.address}: Ray {version}, {len(nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"
    same = version == here
    mend = "" if same else f"Ray here is {here}; use the same on both sides"
    yield Finding("cluster", "ok" if same else "warning", found, mend)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
