"""Write down which samples each committed step took, to prove that none is lost or taken twice."""

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_ledger(
    path: Path, *, generation: int, step: int, rank: int, sample_ids: NDArray[np.int64]
) -> None:
    """Append one JSON line: this rank's samples of a step.

    A step that was lost with its worker is taken again by the next generation, so of each step
    the lines of the newest generation count.
    """
    line = {"generation": generation, "step": step, "rank": rank, "sample_ids": sample_ids.tolist()}
    # One write in append mode, so that the ranks of a machine may share a file.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def read_ledger(path: Path) -> dict[int, list[int]]:
    """Return, per step, the sample ids that counted, in the order of the ranks.

    A line that a killed worker left half-written is passed over: its step was taken again.
    """
    newest: dict[int, int] = {}
    shares: dict[int, dict[int, list[int]]] = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        step, generation = line["step"], line["generation"]
        if generation > newest.get(step, -1):
            newest[step], shares[step] = generation, {}
        if generation == newest[step]:
            shares[step][line["rank"]] = line["sample_ids"]
    return {
        step: [sample for rank in sorted(ranks) for sample in ranks[rank]]
        for step, ranks in sorted(shares.items())
    }
