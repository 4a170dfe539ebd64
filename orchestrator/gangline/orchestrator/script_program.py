"""What a worker runs for `kind: script`: the user's own torchrun-style script as a child process.

The script finds the environment that torchrun gives (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT, ...) and GANGLINE_RUN_DIR, GANGLINE_GENERATION beside it. When a rank fails, all are
ended and started again under the next generation; going on from its own checkpoint is the
script's part.

The communication of the script, and of the Python processes that it starts, is recorded: each finds
`script_hook` on its PYTHONPATH, and there a `sitecustomize` that Python runs at its start.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gangline.comm.ring_folders import ring_folder
from gangline.orchestrator.worker import Assignment, Control, build_recorder

Json = dict[str, Any]

_POLL_S = 0.05
_HOOK = Path(__file__).with_name("script_hook")
# The child asks the kernel to be killed with its parent and then becomes the script: a worker
# that is killed leaves no script behind. (prctl option 1 is PR_SET_PDEATHSIG.)
_LAUNCH = (
    "import ctypes, os, sys; "
    "ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); "
    "os.execv(sys.executable, [sys.executable, '-u', *sys.argv[2:]])"
)


class ScriptError(RuntimeError):
    """The user's script ended with an error."""


@dataclass(frozen=True)
class ScriptProgramSpec:
    """What to run. `env` is added to the worker's environment."""

    script: Path
    args: tuple[str, ...]
    env: dict[str, str]
    working_dir: Path
    run_dir: Path
    grace_s: float


class ScriptProgram:
    """Start the script per generation, wait for it, end it with its whole process group."""

    def __init__(self, spec: ScriptProgramSpec) -> None:
        self._spec = spec

    def prepare(self) -> Json:
        """Nothing is shared between the ranks of a script."""
        return {}

    def warm(self, shared: Json) -> None:
        """Check that the script is there, so that a typing error fails before a group is made."""
        script = self._spec.working_dir / self._spec.script
        if not script.is_file():
            raise FileNotFoundError(
                f"script: {script} is not a file on {socket.gethostname()}; give a path that "
                "every node of the cluster sees"
            )
        build_recorder()  # here once, so that no rank builds while the others wait for it

    def open_store(self, world_size: int, host: str) -> int:
        """Return a port that was free a moment ago; the script's rank 0 opens the store itself."""
        with socket.socket() as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])

    def run(self, assignment: Assignment, control: Control) -> Json:
        """Run the script as one rank.

        Raises: ScriptError when it exits with anything but 0.
        """
        spec = self._spec
        command = [sys.executable, "-c", _LAUNCH, str(os.getpid())]
        command += [str(spec.script), *spec.args]
        process = subprocess.Popen(
            command,
            cwd=spec.working_dir,
            env=_with_recorder(
                os.environ | _rank_environment(assignment, spec.run_dir) | spec.env, spec.run_dir
            ),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                control.progress(assignment.generation)
                if control.should_stop.wait(_POLL_S):
                    _end_group(process, spec.grace_s)
                    return {"stopped": True, "exit_code": process.returncode}
        finally:
            _end_group(process, 0.0)
        if process.returncode != 0:
            raise ScriptError(f"{spec.script} {_how_it_ended(process.returncode)}")
        return {"stopped": False, "exit_code": 0}


def _rank_environment(assignment: Assignment, run_dir: Path) -> dict[str, str]:
    # One rank per worker, so each is the only one of its node as far as the script can tell: a
    # GPU worker sees its own GPU as cuda:0.
    return {
        "RANK": str(assignment.rank),
        "WORLD_SIZE": str(assignment.world_size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(assignment.rank),
        "GROUP_WORLD_SIZE": str(assignment.world_size),
        "MASTER_ADDR": assignment.master_host,
        "MASTER_PORT": str(assignment.master_port),
        "TORCHELASTIC_RUN_ID": run_dir.name,
        "TORCHELASTIC_RESTART_COUNT": str(assignment.generation),
        "GANGLINE_RUN_DIR": str(run_dir),
        "GANGLINE_GENERATION": str(assignment.generation),
        "PYTHONUNBUFFERED": "1",
    }


def _with_recorder(env: dict[str, str], run_dir: Path) -> dict[str, str]:
    """Return the environment in which Python records what it communicates."""
    paths = [str(_HOOK), *filter(None, [env.get("PYTHONPATH")])]
    return env | {
        "PYTHONPATH": os.pathsep.join(paths),
        "GANGLINE_RINGS": str(ring_folder(run_dir)),
    }


def _end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the script and all it started: SIGTERM, then SIGKILL after `grace_s`."""
    deadline_s = time.monotonic() + grace_s
    if grace_s > 0 and _signal_group(process, signal.SIGTERM):
        while process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _how_it_ended(returncode: int) -> str:
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"exited with code {returncode}"
