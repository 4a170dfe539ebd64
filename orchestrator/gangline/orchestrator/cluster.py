"""Start a private Ray for one run, or connect to a given one.

A private Ray has its own ports, its own token and its own folder, so that two runs on a machine
do not see each other; it ends with the process that started it, however that ends (Ray's
processes ask the kernel to be killed with their parent), and its folder is removed at the end or,
after a SIGKILL, by the next run.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from gangline.orchestrator.errors import ClusterError
from gangline.orchestrator.plan_fit import ClusterResources, cluster_of

# Ray puts unix sockets below its folder, and a socket's path has at most 107 bytes.
# RAY_TMPDIR is Ray's own variable for that place. In a host of a lab it is one that no other host
# sees: pids there mean nothing elsewhere, and here a folder whose owner is dead is removed.
_TEMP_ROOT = Path(os.environ.get("RAY_TMPDIR") or "/tmp")  # noqa: S108 - mkdtemp makes it private
_TEMP_PREFIX = "gangline-ray-"
_OWNER_FILE = "owner.json"
# Marks a process whose environment `_set_up_environment` has made ready.
_MARK = "GANGLINE_PRIVATE_RAY_PID"
_OBJECT_STORE_BYTES = 80 * 2**20

# A node is declared lost about 2 s after its last sign of life rather than Ray's 15 s.
_HEALTH_SETTINGS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def connect(
    address: str | None,
    *,
    namespace: str,
    min_cpus: float,
    token_file: str | None = None,
    log: TextIO = sys.stderr,
) -> Iterator[ClusterResources]:
    """Connect this process to Ray for the length of the block; yield what the cluster has.

    `address` None starts a private Ray which offers at least `min_cpus` logical CPUs: on a small
    machine the ranks share the cores rather than wait for ones that do not exist. What Ray has to
    say of lost workers goes to `log`; left alone it would go to stdout, among our records.

    Raises: ClusterError when the given cluster cannot be reached or refuses the token.
    """
    if address is None:
        with _private_ray(namespace, min_cpus, log):
            yield _resources()
        return
    if token_file is not None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_file}
    import ray

    _send_messages_to(log)
    try:
        ray.init(address=address, namespace=namespace, **_quiet())
    except Exception as error:
        raise ClusterError(
            f"cannot join the Ray cluster at {address!r}: {_first_line(error)}; check "
            "cluster.address and the token (RAY_AUTH_TOKEN or cluster.token_file)"
        ) from error
    try:
        yield _resources()
    finally:
        ray.shutdown()


@contextmanager
def _private_ray(namespace: str, min_cpus: float, log: TextIO) -> Iterator[None]:
    remove_stale_folders()
    _set_up_environment()
    import ray

    _send_messages_to(log)
    folder = Path(tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=_TEMP_ROOT))
    owner = {"pid": os.getpid(), "start": process_start(os.getpid())}
    (folder / _OWNER_FILE).write_text(json.dumps(owner))
    try:
        ray.init(
            address="local",
            namespace=namespace,
            num_cpus=max(math.ceil(min_cpus), os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            **_quiet(),
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _set_up_environment() -> None:
    """Give this process the settings of a private Ray, once.

    Ray takes its settings from the environment, and keeps the authentication mode and the token
    that it found when it was first imported; so they are set before that, and stay.

    Raises: ClusterError when Ray has been imported without them.
    """
    if os.environ.get(_MARK) == str(os.getpid()):
        return
    if "ray" in sys.modules:
        raise ClusterError(
            "a private Ray cannot start here: ray was imported before, without token "
            "authentication; run the job before `import ray`, or name a cluster in cluster.address"
        )
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= {
        _MARK: str(os.getpid()),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Nothing but our actors runs here: no idle workers are kept warm for tasks.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        **_HEALTH_SETTINGS,
    }


def _send_messages_to(log: TextIO) -> None:
    """Replace the one function through which Ray's driver prints the cluster's messages."""
    from ray._private import worker as ray_worker

    assert hasattr(ray_worker, "print_to_stdstream"), "Ray has moved it; see its release notes"

    def print_to_log(data: dict[str, Any], ignore_prefix: bool) -> None:
        print(*data["lines"], sep="\n", file=log, flush=True)

    ray_worker.print_to_stdstream = print_to_log


def remove_stale_folders() -> int:
    """Remove the folders of private Rays whose owner is dead; return how many."""
    num_removed = 0
    for folder in _TEMP_ROOT.glob(f"{_TEMP_PREFIX}*"):
        try:
            owner = json.loads((folder / _OWNER_FILE).read_text())
            alive = process_start(owner["pid"]) == owner["start"]
        except (OSError, ValueError, KeyError):
            continue  # not ours, or just being made
        if not alive:
            shutil.rmtree(folder, ignore_errors=True)
            num_removed += 1
    return num_removed


def process_start(pid: int) -> str | None:
    """Return the kernel's start time of a process, which tells it from a later one of its pid."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}


def _resources() -> ClusterResources:
    import ray

    return cluster_of([node["Resources"] for node in ray.nodes() if node["Alive"]])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
