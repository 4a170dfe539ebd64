"""Index arithmetic on rows that lie in runs, without a wait for the device.

Rows travel grouped by (source, expert) and are used grouped by (expert, source); each regrouping
moves whole runs of rows. The lengths of the runs are tensors on the device; how many rows there
are in all is known on the host.
"""

import torch
from torch import Tensor


def regroup(lengths_AB: Tensor, num_rows: int) -> Tensor:
    """Return the index that takes rows from (a, b) order to (b, a) order.

    Its inverse is `regroup(lengths_AB.t(), num_rows)`.

    Shapes: lengths_AB [A, B] int64, rows of each run, in the present order; returns [num_rows].
    """
    num_a, num_b = lengths_AB.shape
    wanted = torch.arange(num_a * num_b, device=lengths_AB.device).view(num_a, num_b).t().flatten()
    return take_runs(lengths_AB.flatten(), wanted, num_rows)


def take_runs(lengths: Tensor, wanted: Tensor, num_rows: int) -> Tensor:
    """Return the index of the rows of the wanted runs, in the wanted order.

    Shapes: lengths [runs] int64, in the present order; wanted [any] int64, numbers of runs;
    num_rows, the rows of the wanted runs; returns [num_rows].
    """
    starts = (lengths.cumsum(0) - lengths)[wanted]
    lengths = lengths[wanted]
    # Row j of the result lies in some run; it is that run's start plus j's place in it.
    shift = starts - (lengths.cumsum(0) - lengths)
    rows = torch.arange(num_rows, device=lengths.device)
    return rows.add_(shift.repeat_interleave(lengths, output_size=num_rows))
