"""Send a job to a Ray cluster through its job API.

What travels: Gangline's own source as a `py_modules` package, so that the cluster needs only the
dependencies, and one archive with the resolved job and, for `kind: script`, the user's files. A
wheel would travel as well, but Ray installs a wheel with all its dependencies on every node.

The entry point is built from our own words with shlex; nothing a user wrote is in it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gangline.orchestrator.errors import ClusterError, GanglineError, NotFoundError
from gangline.orchestrator.job_models import WorkersConfig
from gangline.orchestrator.jobs_rest import JobsRest, crosses_network_in_clear
from gangline.orchestrator.plan_fit import check_fits, cluster_of

_MIN_PYTHON = (3, 11)
_FALLBACK_PYTHON = "python3"
_JOB_FILE = "job.json"
_ENVIRONMENT_FILE = "env.json"
# What of our source tree is not source.
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.pyo", ".*")
# Kept out of Ray's way: it would put them before our own address and token.
_RAY_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Ray refuses a package of 512 MiB, after it has been sent.
_MAX_ARCHIVE_BYTES = 500 * 2**20
# They tell at INFO, on stderr, about each package.
_TALKATIVE_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
_ARCHIVE_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Submission:
    """One job to send.

    `job` is the resolved job as JSON values. `files` maps a path in the archive to the file it
    comes from. `run_dir` is an absolute path that every node of the cluster sees. `grace_s` is how
    long Ray waits between SIGTERM and SIGKILL when the job is stopped. `env` holds the variables
    that `env_from` names.
    """

    submission_id: str
    run_id: str
    job: Mapping[str, Any]
    run_dir: Path
    files: Mapping[str, Path]
    grace_s: float
    env: Mapping[str, str]


def preflight(workers: WorkersConfig, rest: JobsRest, on_note: Callable[[str], None]) -> str:
    """Check that the cluster answers, knows our token and could hold the job.

    Returns: the interpreter to start the driver with. `on_note` gets warnings, one line each.
    Raises: UnreachableError, AuthError, PlanError; ClusterError for a Python too old.
    """
    rest.version()
    _check_python(rest.python_version(), on_note)
    if crosses_network_in_clear(rest.address, rest.token):
        on_note(
            f"the token crosses the network in clear to {rest.address}; whoever reads it owns the "
            "cluster: use https or a port-forward to 127.0.0.1"
        )
    check_fits(workers, cluster_of(rest.node_resources()))
    return rest.head_python() or _FALLBACK_PYTHON


def send(submission: Submission, rest: JobsRest, python: str) -> None:
    """Send the job. Sending the same submission id again is harmless: the first one counts.

    Raises: ClusterError when Ray refuses it or does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="gangline-submit-") as scratch:
        package = stage_package(Path(scratch) / "package")
        archive = stage_archive(Path(scratch) / "job.zip", submission)
        if archive.stat().st_size > _MAX_ARCHIVE_BYTES:
            raise GanglineError(
                f"the files of working_dir come to {archive.stat().st_size / 2**20:.0f} MiB "
                f"compressed and Ray carries {_MAX_ARCHIVE_BYTES / 2**20:.0f} MiB; add what the "
                "script does not need to .gitignore, and put data where every node sees it"
            )
        _post(submission, rest, entry_point(python, submission.run_dir), package, archive)


def entry_point(python: str, run_dir: Path) -> str:
    """Return the shell command that Ray runs on the head for this job."""
    command = [python, "-m", "gangline.orchestrator.driver"]
    return shlex.join([*command, "--job", _JOB_FILE, "--run-dir", str(run_dir)])


def stage_package(destination: Path) -> Path:
    """Copy every portion of the namespace package `gangline` into `<destination>/gangline`.

    Here it may be one folder (an installed wheel) or several (an editable install); there it must
    be one that Python can import from a single place.
    """
    import gangline

    package = destination / "gangline"
    for portion in gangline.__path__:
        shutil.copytree(portion, package, ignore=_LEFT_OUT, dirs_exist_ok=True)
    return package


def stage_archive(path: Path, submission: Submission) -> Path:
    """Write the job's working directory: `job.json` and the user's files, byte for byte.

    An archive rather than a folder, because Ray leaves out of a folder what .gitignore and its own
    list of names say. Equal contents give equal archives, which the cluster has to get only once.

    The variables travel in it too, not in Ray's `env_vars`, which every listing of jobs shows.
    """
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        job = json.dumps(dict(submission.job), indent=1, sort_keys=True)
        _add(archive, _JOB_FILE, job.encode(), 0o644)
        if submission.env:
            env = json.dumps(dict(submission.env), sort_keys=True)
            _add(archive, _ENVIRONMENT_FILE, env.encode(), 0o600)
        for name, source in sorted(submission.files.items()):
            assert name not in (_JOB_FILE, _ENVIRONMENT_FILE), "the plan keeps our names free"
            mode = 0o755 if os.access(source, os.X_OK) else 0o644
            _add(archive, name, source.read_bytes(), mode)
    return path


def take_environment(job_file: Path) -> None:
    """Set the variables that travelled beside `job_file`, if any, in this process.

    The driver of a submitted job calls it first.
    """
    try:
        variables = json.loads(job_file.with_name(_ENVIRONMENT_FILE).read_bytes())
    except FileNotFoundError:
        return
    os.environ.update(variables)


def _add(archive: zipfile.ZipFile, name: str, content: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(name, date_time=_ARCHIVE_TIME)
    entry.external_attr = mode << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, content)


def _check_python(version: str, on_note: Callable[[str], None]) -> None:
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        on_note(f"the cluster does not say which Python it runs ({version})")
        return
    if (major, minor) < _MIN_PYTHON:
        wanted = ".".join(map(str, _MIN_PYTHON))
        raise ClusterError(
            f"the cluster runs Python {version} and Gangline needs {wanted} or newer; use a "
            "cluster whose image has it"
        )


def _post(
    submission: Submission, rest: JobsRest, entrypoint: str, package: Path, archive: Path
) -> None:
    # Ray waits 3 s between SIGTERM and SIGKILL, too little for a last checkpoint.
    env = {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(submission.grace_s))}
    headers = {"Authorization": f"Bearer {rest.token.value}"} if rest.token else {}
    with _without(_RAY_VARIABLES):
        from ray.job_submission import JobSubmissionClient

        for name in _TALKATIVE_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            client = JobSubmissionClient(rest.address, headers=headers)
            # No CPUs for the entry point: that keeps it on the head, where the run folder of a
            # resumed job is found again, and takes nothing from the workers.
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission.submission_id,
                runtime_env={
                    "working_dir": str(archive),
                    "py_modules": [str(package)],
                    "env_vars": env,
                },
                metadata={"gangline_run_id": submission.run_id},
            )
        except Exception as error:
            if _is_there(rest, submission.submission_id):
                return  # an answer was lost on the way, or somebody was quicker
            raise ClusterError(
                f"{rest.address} refused the job: {_last_line(error)}; see the head's "
                "dashboard_agent.log"
            ) from error


def _is_there(rest: JobsRest, submission_id: str) -> bool:
    try:
        rest.job(submission_id)
    except NotFoundError:
        return False
    return True


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[-1] if lines else type(error).__name__).strip()[:300]


@contextmanager
def _without(variables: Sequence[str]) -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)
