"""What a worker runs for `kind: train`: the trainer, one generation at a time."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gangline.orchestrator.worker import Assignment, Control
from gangline.trainers.config import TrainConfig

if TYPE_CHECKING:
    from gangline.trainers.checkpoint import CheckpointEvent
    from gangline.trainers.data import DatasetInfo
    from gangline.trainers.results import EvalResult, StepResult
    from gangline.trainers.trainer import Trainer

Json = dict[str, Any]

_PRINT_EVERY_S = 1.0
# What waits for room on a full disk: some ten thousand steps.
_MAX_PENDING_BYTES = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class TrainProgramSpec:
    """What a worker needs to know before it is told its rank."""

    config: TrainConfig
    run_dir: Path
    cache_dir: Path
    comm_timeout_s: float
    use_gpu: bool


class TrainProgram:
    """Build the model once; then train as whatever rank of whatever generation.

    torch is imported inside the methods: the controller imports this module too, and needs none.
    """

    def __init__(self, spec: TrainProgramSpec) -> None:
        self._spec = spec
        self._trainer: Trainer | None = None
        self._dataset_info: DatasetInfo | None = None
        self._store: object = None  # kept, for it ends with its last reference

    def prepare(self) -> Json:
        """Tokenise the corpus into the cache, if it is not there; return what describes it."""
        from gangline.trainers.data import prepare_dataset

        info = prepare_dataset(self._spec.config.data, self._spec.cache_dir, print)
        return {"dataset": info.to_json()}

    def warm(self, shared: Json) -> None:
        """Import torch, build the model and the optimizer, open the data."""
        if self._spec.use_gpu and self._spec.config.training.deterministic:
            # cuBLAS reads it once; without it torch refuses deterministic matrix products.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        from gangline.trainers.data import DatasetInfo
        from gangline.trainers.trainer import Trainer

        self._dataset_info = DatasetInfo.from_json(shared["dataset"])
        device = "cuda" if self._spec.use_gpu else "cpu"
        self._trainer = Trainer(
            self._spec.config, vocab_size=self._dataset_info.vocab_size, device=device
        )

    def open_store(self, world_size: int, host: str) -> int:
        """Open the TCPStore of the next generation in this process."""
        from gangline.comm.mesh import open_store

        self._store, port = open_store(world_size, host=host)
        return port

    def run(self, assignment: Assignment, control: Control) -> Json:
        """Train until the last step, a stop, or an error."""
        from gangline.comm.abort import AbortSwitch
        from gangline.comm.mesh import Mesh
        from gangline.trainers.data import TokenDataset

        assert self._trainer is not None, "warm() comes before run()"
        assert self._dataset_info is not None, "warm() comes before run()"
        config, run_dir = self._spec.config, self._spec.run_dir
        dataset = TokenDataset(
            self._dataset_info,
            seq_len=config.data.seq_len,
            seed=config.training.seed,
            validation_fraction=config.data.validation_fraction,
        )
        switch = AbortSwitch()  # made first, so that also the join can be aborted
        control.abort = switch.abort
        mesh = Mesh.join(
            rank=assignment.rank,
            world_size=assignment.world_size,
            store_host=assignment.master_host,
            store_port=assignment.master_port,
            generation=assignment.generation,
            expert_parallel=config.mesh.expert_parallel,
            device="cuda" if self._spec.use_gpu else "cpu",
            timeout_s=self._spec.comm_timeout_s,
            switch=switch,
        )
        try:
            with StepLog(run_dir, assignment.generation, assignment.rank) as log:
                result = self._trainer.run(
                    mesh,
                    dataset,
                    checkpoint_root=run_dir / "checkpoints",
                    on_step=lambda step: _note_step(log, control, step),
                    on_eval=lambda result: _note_evaluation(log, result),
                    on_checkpoint=lambda event: _note_checkpoint(log, event),
                    report=print,
                    should_stop=control.should_stop.is_set,
                    ledger=run_dir / "ledger" if config.training.sample_ledger else None,
                )
        finally:
            mesh.leave()
        return dataclasses.asdict(result)


def _note_step(log: StepLog, control: Control, step: StepResult) -> None:
    log.write("step", dataclasses.asdict(step))
    control.progress(step.step)
    if log.is_open and log.may_print():
        print(
            f"step {step.step}  loss {step.loss:.4f}  lr {step.lr:.2e}  grad norm "
            f"{step.grad_norm:.3f}  {step.step_s:.3f} s  {step.num_tokens / step.step_s:.0f} "
            f"tokens/s{'' if step.committed else '  NOT COMMITTED: loss or gradient not finite'}"
        )


def _note_checkpoint(log: StepLog, event: CheckpointEvent) -> None:
    log.write("checkpoint", dataclasses.asdict(event))
    if log.is_open:
        print(f"checkpoint of step {event.step}: {event.status} {event.reason}".rstrip())


def _note_evaluation(log: StepLog, result: EvalResult) -> None:
    log.write("eval", dataclasses.asdict(result))
    if log.is_open:
        print(f"evaluation after step {result.step}: loss {result.loss:.4f}")


class StepLog:
    """Rank 0's account of a generation: one JSON line per step, evaluation and checkpoint.

    A line is one `write` to the page cache: it costs the step microseconds, outlives a SIGKILL of
    the worker, and needs no answer from anyone. The controller reads the file of the current
    generation only, so a stale rank can write but is not heard.
    """

    def __init__(self, run_dir: Path, generation: int, rank: int) -> None:
        self._fd = -1
        self._pending = b""
        self._printed_s = -math.inf
        if rank == 0:
            path = step_log_path(run_dir, generation)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @property
    def is_open(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return self._fd >= 0

    def may_print(self) -> bool:
        """Return True at most once a second: a log for people, not a second record."""
        now_s = time.monotonic()
        if now_s - self._printed_s < _PRINT_EVERY_S:
            return False
        self._printed_s = now_s
        return True

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def write(self, kind: str, fields: Json) -> None:
        """Append one line; do nothing on other ranks than 0.

        A full disk does not stop the training: lines wait in memory until there is room again.
        """
        if self._fd < 0:
            return
        self._pending += json.dumps({"kind": kind, **fields}, default=str).encode() + b"\n"
        try:
            # On a disk that is about to be full a write may take a part of it.
            self._pending = self._pending[os.write(self._fd, self._pending) :]
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not is_full or len(self._pending) > _MAX_PENDING_BYTES:
                raise


def step_log_path(run_dir: Path, generation: int) -> Path:
    """Return where rank 0 of a generation writes its steps."""
    return run_dir / "steps" / f"generation-{generation:06d}.jsonl"
