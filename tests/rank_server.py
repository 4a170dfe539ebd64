"""Run scenarios on the ranks of a mesh; tests/conftest.py starts this.

Imports torch once and forks the ranks of each scenario, so that a scenario costs milliseconds and
its ranks can be killed and leave nothing behind. This process itself computes nothing, so the
forks inherit no threads.

Reads one JSON job a line: file and function of the scenario, its keyword arguments, the mesh to
join, the ranks' hosts, and the folder for their replies; writes the ranks' process ids, then that
all ended.
"""

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gangline.comm.mesh import Mesh

_loaded: dict[str, ModuleType] = {}


def load(file: str) -> ModuleType:
    """Import a scenario file by its path, once."""
    if file not in _loaded:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None, f"{file} is not a Python file"
        assert spec.loader is not None, f"{file} has no loader"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _loaded[file] = module
    return _loaded[file]


def run_rank(job: dict[str, Any], rank: int) -> None:
    """Join the job's mesh, run its scenario there, leave, and write what it returned."""
    torch.set_num_threads(1)
    try:
        scenario = getattr(load(job["file"]), job["function"])
        mesh = Mesh.join(
            rank=rank, world_size=job["world_size"], host=job["hosts"][rank], **job["mesh"]
        )
        try:
            reply = {"result": scenario(mesh, **job["kwargs"])}
        finally:
            mesh.leave()
    except BaseException:  # noqa: BLE001 - it is the test's to judge
        reply = {"error": traceback.format_exc()}
    Path(job["replies"], f"rank-{rank}.json").write_text(json.dumps(reply))


def main() -> None:
    """Serve until the input ends."""
    # torch.empty gives NaN, so that a read of what was never written shows. Here and not in the
    # ranks, because it imports a second's worth of modules.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the test's log
    for line in sys.stdin:
        job = json.loads(line)
        load(job["file"])
        pids = []
        for rank in range(job["world_size"]):
            pid = os.fork()
            if pid == 0:
                run_rank(job, rank)
                sys.stdout.flush()
                os._exit(0)
            pids.append(pid)
        answers.write(json.dumps(pids) + "\n")
        answers.flush()
        for pid in pids:
            os.waitpid(pid, 0)
        answers.write("done\n")
        answers.flush()


if __name__ == "__main__":
    main()
