"""Load a checkpoint onto any number of ranks: all ranks get all of it, or none is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gangline.comm.collectives import exchange_json
from gangline.comm.mesh import Mesh
from gangline.trainers.checkpoint_plan import ShardLoadPlanner, State
from gangline.trainers.checkpoint_reader import SafetensorsReader
from gangline.trainers.commit import (
    CheckpointError,
    CheckpointInfo,
    CorruptCheckpointError,
    list_checkpoints,
)


def load(info: CheckpointInfo, state: State, mesh: Mesh, *, strict: bool = True) -> dict[str, Any]:
    """Load a checkpoint into the tensors of `state`, in place, whatever ranks have written it.

    `strict` refuses a checkpoint with tensors that no rank asks for.

    Returns: the `extra` of the save. Communicates: one exchange of verdicts.
    Raises: CorruptCheckpointError naming the file, or CheckpointError naming the tensor that does
    not fit, on every rank; CommError.
    Guarantees: every byte used was hashed by this call. Unless every rank has verified all files
    that it needs, no rank changes a tensor. Files beyond what is held in memory (see
    checkpoint_reader.MAX_HELD_BYTES) are verified a second time as they are used; should one of
    them change in between, the error leaves `state` half loaded.
    """
    return _load(info.path, info.manifest_sha256, state, mesh, strict=strict).extra


def load_newest(
    root: Path,
    state: State,
    mesh: Mesh,
    *,
    report: Callable[[str], None] | None = None,
    strict: bool = True,
    ignore: str = "",
) -> CheckpointInfo | None:
    """Load the newest checkpoint that all ranks can verify; None where there is none.

    Tensors whose names begin with `ignore` may be in the checkpoint and not in `state`.

    Rank 0 says which ones there are. Each rank verifies what it needs, all at the same time, and a
    corrupt step is skipped by all together; `report` gets a line for each. Cheaper than `newest`
    and then `load`, which hash everything on one rank and then again.

    Raises: CheckpointError where a sound checkpoint does not fit this job: then an older one does
    not either, and to start afresh in silence would throw the run away.
    """
    found = [(i.path.name, i.manifest_sha256, i.problem) for i in list_checkpoints(root)]
    for name, manifest_sha256, problem in exchange_json(found, mesh, "world")[0]:
        try:
            if problem is not None:
                raise CorruptCheckpointError(Path(root) / name, problem)
            return _load(
                Path(root) / name, manifest_sha256, state, mesh, strict=strict, ignore=ignore
            )
        except CorruptCheckpointError as error:
            if report is not None:
                report(str(error))
    return None


def _load(
    path: Path, manifest_sha256: str, state: State, mesh: Mesh, *, strict: bool, ignore: str = ""
) -> CheckpointInfo:
    reader = SafetensorsReader(path, manifest_sha256=manifest_sha256)
    planner = ShardLoadPlanner()
    problem: CheckpointError | None = None
    unasked: list[str] = []
    try:
        metadata = reader.read_metadata()
        planner.set_up_planner(state, metadata)
        plan = planner.create_local_plan()
        unasked = sorted(
            name
            for name in metadata.state_dict_metadata.keys() - state.keys()
            if not (ignore and name.startswith(ignore))
        )
        reader.fetch(plan)
    except CheckpointError as error:
        problem = error
    verdict = {"problem": problem and _problem_to_json(problem), "unasked": unasked}
    verdicts = exchange_json(verdict, mesh, "world")
    if problem is not None:
        raise problem
    for rank, other in enumerate(verdicts):
        if other["problem"]:
            raise _problem_from_json(other["problem"], rank)
    by_nobody = set.intersection(*(set(other["unasked"]) for other in verdicts))
    if strict and by_nobody:
        raise CheckpointError(
            f"{path} has {len(by_nobody)} tensors that this job does not, such as "
            f"{min(by_nobody)!r}; the model of the job file must be the one that wrote it"
        )
    reader.read_data(plan, planner)
    assert reader.info is not None, "read_metadata has set it"
    return reader.info


def _problem_to_json(error: CheckpointError) -> list[str]:
    if isinstance(error, CorruptCheckpointError):
        return ["corrupt", str(error.file), error.reason]
    return ["unfit", str(error)]


def _problem_from_json(problem: list[str], rank: int) -> CheckpointError:
    if problem[0] == "corrupt":
        return CorruptCheckpointError(Path(problem[1]), f"{problem[2]} (seen by rank {rank})")
    return CheckpointError(f"{problem[1]} (seen by rank {rank})")
