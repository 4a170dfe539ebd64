"""The benches of `gangline bench`: each prints its table, and ends with 1 where a check failed."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from gangline.orchestrator import api
from gangline.orchestrator.commands_options import Common
from gangline.orchestrator.errors import ExitCode, UsageError


def recovery(
    *,
    seeds: Annotated[int, Parameter(help="Kills per case; each has its own seed.")] = 20,
    first_seed: Annotated[
        int, Parameter(help="The first of the seeds; with --seeds 1 it replays one kill.")
    ] = 0,
    spares: Annotated[
        tuple[int, ...],
        Parameter(help="Spares of a case: 1 is a warm spare, 0 a cold restart; may be repeated."),
    ] = (1, 0),
    peer_kills: Annotated[
        int, Parameter(help="Kills of Ray Train's TorchTrainer beside ours; 0 leaves it out.")
    ] = 5,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Kill random workers of a small job at random instants; time the way back.

    The final weights must be those of the run without a kill, bit for bit.
    """
    if seeds < 1 or peer_kills < 0:
        raise UsageError(f"--seeds {seeds} --peer-kills {peer_kills}: wanted at least 1 and 0")
    from gangline.orchestrator.bench_recovery import num_problems, render, run_bench

    result = run_bench(
        num_seeds=seeds,
        first_seed=first_seed,
        spares=spares,
        num_peer_kills=peer_kills,
        scratch=(common.runs or api.DEFAULT_RUNS).absolute() / "bench" / "recovery",
        note=common.note,
    )
    if common.json:
        common.data_json({"version": 1, **result})
    else:
        common.data(render(result))
    return ExitCode.ERROR if num_problems(result) else ExitCode.OK


def checkpoint(
    *,
    quick: Annotated[bool, Parameter(help="About a minute instead of ten.")] = False,
    only: Annotated[
        tuple[str, ...],
        Parameter(
            help="Only this part; may be repeated. There are kill, calls, errors, space, power, "
            "damage and stall."
        ),
    ] = (),
    seed: Annotated[int, Parameter(help="The seed of all that is random.")] = 0,
    first: Annotated[int, Parameter(help="Number of the first case, as a failure prints it.")] = 0,
    call: Annotated[
        str | None, Parameter(help="One system call, such as fsync#2, as a failure prints it.")
    ] = None,
    common: Common = Common(),  # noqa: B008 - frozen
) -> int:
    """Break the writer of checkpoints and its disk; look for losses, beside stock DCP.

    No acknowledged step may be lost and nothing damaged may load.
    """
    from gangline.orchestrator.bench_checkpoint import PARTS, run_bench

    if unknown := sorted(set(only) - set(PARTS)):
        raise UsageError(f"--only {', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    result = run_bench(
        quick=quick,
        json=common.json,
        out=sys.stdout,
        only=only or PARTS,
        seed=seed,
        first=first,
        call=call,
    )
    return ExitCode.OK if result["ok"] else ExitCode.ERROR
