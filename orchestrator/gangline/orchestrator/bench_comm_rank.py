"""One rank of `gangline bench comm` on this machine: a process that bench_comm.py starts.

Its order is one JSON object on stdin. Rank 0 prints the tables to stdout; every rank leaves in the
folder of the bench what came of it, and rank 0 the port at which the ranks meet.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.01


def main() -> int:
    """Run one rank; return 0 when it has left an outcome."""
    order = json.loads(sys.stdin.read())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != order["parent"]:
        return 1  # it was gone before the kernel knew that we care
    folder, rank = Path(order["folder"]), order["rank"]
    from gangline.comm.errors import CommError
    from gangline.monitoring.comm_bench import UnsupportedError

    try:
        outcome = _measure(order, folder)
    except UnsupportedError as error:
        outcome = {"unsupported": str(error)}
    except CommError as error:
        outcome = {"lost": str(error), "at": time.time()}
    _leave(folder / f"rank-{rank}.json", json.dumps(outcome))
    return 0


def outcome_of(folder: Path, rank: int) -> Json | None:
    """Return what a rank has left; None while there is nothing."""
    try:
        outcome: Json = json.loads((folder / f"rank-{rank}.json").read_text())
    except FileNotFoundError:
        return None
    return outcome


def _measure(order: Json, folder: Path) -> Json:
    import torch

    from gangline.comm.mesh import Mesh, open_store
    from gangline.monitoring.comm_bench import Surroundings, run_operation
    from gangline.monitoring.comm_bench_config import CommBenchConfig

    torch.set_num_threads(1)
    config = CommBenchConfig.model_validate_json(json.dumps(order["config"]))
    rank, world_size = order["rank"], order["world_size"]
    if rank == 0:
        store, port = open_store(world_size)  # kept, for it ends with its last reference
        _leave(folder / "port", str(port))
    else:
        store, port = None, _wait_for_port(folder / "port", order["timeout_s"])
    mesh = Mesh.join(
        rank=rank,
        world_size=world_size,
        store_host="127.0.0.1",
        store_port=port,
        generation=0,
        device=f"cuda:{rank}" if order["device"] == "cuda" else "cpu",
        timeout_s=order["timeout_s"],
    )
    try:
        reports = [
            run_operation(
                operation,
                config,
                mesh,
                sink=_Stdout() if rank == 0 else None,
                surroundings=Surroundings(
                    version=importlib.metadata.version("gangline"), environment=os.environ
                ),
            )
            for operation in config.operations
        ]
    finally:
        mesh.leave()
        del store
    return {
        "failures": [r.sentence(config.min_busbw_gbs) for r in reports if not r.is_ok],
        "documents": [report.json for report in reports] if rank == 0 else [],
    }


class _Stdout:
    """Print the tables."""

    def text(self, text: str) -> None:
        """Print a piece."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def result(self, result: Json) -> None:
        """The row has been printed."""


def _wait_for_port(path: Path, timeout_s: float) -> int:
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"rank 0 has not opened its store within {timeout_s:g} s")
        time.sleep(_LOOK_EVERY_S)
    return int(path.read_text())


def _leave(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    draft.replace(path)


if __name__ == "__main__":
    sys.exit(main())
