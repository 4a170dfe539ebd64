"""Measure the loss on held-out samples."""

import numpy as np
import torch

from gangline.comm.collectives import all_reduce
from gangline.comm.mesh import Mesh
from gangline.trainers.data import TokenDataset, share_of_batch
from gangline.trainers.losses import token_loss
from gangline.trainers.model import Transformer
from gangline.trainers.results import EvalResult

# At most so many batches of the training's size, so that an evaluation of a large corpus takes
# no longer than some training steps. They are the first ones, so all evaluations compare.
MAX_EVAL_BATCHES = 64


@torch.no_grad()
def evaluate(
    model: Transformer, mesh: Mesh, dataset: TokenDataset, *, step: int, batch_size: int
) -> EvalResult | None:
    """Return the mean loss over the held-out samples; None where nothing is held out.

    Communicates: each rank takes its share of every batch, also an empty one, so that all enter
    the same exchanges; one all-reduce at the end.
    """
    num_samples = min(dataset.num_validation_samples, MAX_EVAL_BATCHES * batch_size)
    if num_samples == 0:
        return None
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for start in range(0, num_samples, batch_size):
        size = min(batch_size, num_samples - start)
        first, last = share_of_batch(start, size, mesh.rank, mesh.world_size)
        tokens_BS = dataset.validation_tokens(np.arange(first, last)).to(mesh.device)
        logits_BSV, _ = model(tokens_BS[:, :-1])
        targets_BS = tokens_BS[:, 1:]
        sums[0] += token_loss(logits_BSV.flatten(0, 1), targets_BS.flatten())
        sums[1] += targets_BS.numel()
    all_reduce(sums, mesh, "world").wait()
    loss, num_tokens = sums.tolist()
    return EvalResult(step=step, loss=loss / num_tokens, num_tokens=int(num_tokens))
