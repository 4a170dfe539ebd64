"""Train a model on a mesh: from the newest committed step, or from the seed, to the last step.

Assumptions, or the guarantees are void: every rank runs the same config and code on the same kind
of machine; the data and the checkpoint folder are the same for all.

Guarantees:
- A step changes the weights on every rank or on none.
- Nothing in a step draws random numbers and the sample order is a function of (seed, position),
  so weights, optimizer state and one integer, the cursor, are all there is to resume.
- At the same layout a resumed run is bit for bit the uninterrupted one. At another layout it takes
  the same samples, and its sums over ranks are in another order.

Names used here: a *step* counts whether it commits or not, and so do its samples: a batch whose
loss is not finite would be so at every retry. An *update* is a committed step.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gangline.comm.mesh import Mesh
from gangline.trainers.checkpoint import (
    CheckpointError,
    Checkpointer,
    CheckpointEvent,
    StaleGenerationError,
    load_newest,
)
from gangline.trainers.config import TrainConfig, check_layout, config_digest
from gangline.trainers.data import TokenDataset, share_of_batch
from gangline.trainers.data_parallel import FlatParameters
from gangline.trainers.evaluate import evaluate
from gangline.trainers.losses import router_losses, token_loss
from gangline.trainers.model import Transformer
from gangline.trainers.optimizer import Optimizer, learning_rate
from gangline.trainers.parallelize import parallelize, reset, sharded_state
from gangline.trainers.results import EvalResult, StepResult, TrainResult
from gangline.trainers.step_sums import LocalSums
from gangline.trainers.stopwatch import Stopwatch
from gangline.trainers.weights_digest import weights_sha256

__all__ = ["EvalResult", "StepResult", "TrainResult", "Trainer", "TrainingDivergedError"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A model that has not one finite step in so many does not come back by itself.
MAX_SKIPPED_STEPS = 10


class TrainingDivergedError(Exception):
    """Loss or gradient stayed non-finite for too many steps in a row."""


class Trainer:
    """Hold a model and its optimizer, warm, and train them on whatever mesh comes.

    The constructor communicates nothing: a spare makes its Trainer, waits, and is given a mesh.
    """

    def __init__(self, config: TrainConfig, *, vocab_size: int, device: str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.model = Transformer(
            config.model,
            vocab_size=vocab_size,
            max_positions=config.data.seq_len,
            expert_parallel=config.mesh.expert_parallel,
            dtype=_DTYPES[config.training.precision],
        ).to(self.device)
        self.flat = FlatParameters(self.model)
        self.optimizer = Optimizer(self.flat, config.optimizer)
        self.mesh = Mesh.single(device)
        self.step = 0  # steps done
        self.cursor = 0  # stream position of the next sample
        self.num_skipped = 0  # steps in a row that did not commit

    def run(
        self,
        mesh: Mesh,
        dataset: TokenDataset,
        *,
        checkpoint_root: Path,
        on_step: Callable[[StepResult], None] = lambda result: None,
        on_eval: Callable[[EvalResult], None] = lambda result: None,
        on_checkpoint: Callable[[CheckpointEvent], None] = lambda event: None,
        report: Callable[[str], None] = lambda line: None,
        should_stop: Callable[[], bool] = lambda: False,
        ledger: Path | None = None,
    ) -> TrainResult:
        """Train to the last step, or until a rank is asked to stop; then checkpoint.

        Call it from the thread that is to compute: the number of threads is set for that one.

        Raises: CommError when a peer is lost, then call it again with the mesh of the next
        generation; ValueError for a mesh or data that do not fit; CheckpointError when the last
        checkpoint cannot be committed; StaleGenerationError when a newer generation runs;
        TrainingDivergedError.
        """
        self._attach(mesh)
        checkpoint = self.config.checkpoint
        checkpointer = Checkpointer(
            checkpoint_root,
            mesh=mesh,
            keep=checkpoint.keep,
            asynchronous=checkpoint.asynchronous,
            config_digest=config_digest(self.config),
        )
        try:
            self._restore(checkpoint_root, dataset, report)
            stopped = False
            while self.step < self.config.training.steps and not stopped:
                result, stopped = self.train_step(dataset, wants_stop=should_stop())
                ...
        finally:
            checkpointer.close()
