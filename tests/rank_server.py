"""Run scenarios as one rank of a mesh, one after the other; tests/conftest.py starts these.

Reads one JSON job a line: file and function of the scenario, its keyword arguments, and the mesh
to join; writes one JSON reply a line. Started once for many scenarios, since joining a mesh takes
milliseconds and importing torch takes seconds.
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


def run(job: dict[str, Any]) -> Any:
    """Join the job's mesh, run its scenario there, and leave."""
    scenario = getattr(load(job["file"]), job["function"])
    if job["mesh"] is None:
        return scenario(**job["kwargs"])
    mesh = Mesh.join(**job["mesh"])
    try:
        return scenario(mesh, **job["kwargs"])
    finally:
        mesh.leave()


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(1)
    # torch.empty gives NaN, so that a read of what was never written shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the test's log
    for line in sys.stdin:
        try:
            reply = {"result": run(json.loads(line))}
        except BaseException:  # noqa: BLE001 - it is the test's to judge
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
