"""The peer of `bench_recovery`: Ray Train's TorchTrainer, as its documentation says to use it.

Same model, data, batch, optimizer and checkpoint cadence; DDP over the same two workers; a
FailureConfig, and a checkpoint handed to `ray.train.report` every so many steps, from which the
restarted workers go on. Rank 0 writes a line per step, as ours does.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gangline.orchestrator.cluster import connect

if TYPE_CHECKING:
    from gangline.orchestrator.job import TrainJob

Json = dict[str, Any]

# Ray Train looks at its workers this often; its default, and the fastest its documentation names.
_POLL_S = {"default": "2.0", "polling every 0.2 s": "0.2"}
_TIMEOUT_S = 120.0


def run_peer(job: TrainJob, num_kills: int, scratch: Path, note: Callable[[str], None]) -> Json:
    """Kill workers of a TorchTrainer `num_kills` times per setting; return the times."""
    from gangline.orchestrator.bench_recovery import spread

    result: Json = {}
    for name, poll_s in _POLL_S.items():
        folder = scratch / poll_s
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(job.model_dump_json())
        kills = _run_one(folder, poll_s, num_kills, functools.partial(_note_as, note, name))
        result[name] = {
            "n": num_kills,
            "num_failed": num_kills - len(kills),
            "next_s": spread([kill["next_s"] for kill in kills]),
            "regain_s": spread([kill["regain_s"] for kill in kills]),
            "kills": kills,
        }
    return result


def _note_as(note: Callable[[str], None], name: str, text: str) -> None:
    note(f"{name}: {text}")


def _run_one(folder: Path, poll_s: str, num_kills: int, note: Callable[[str], None]) -> list[Json]:
    command = [sys.executable, "-m", __name__, str(folder), str(num_kills)]
    environment = os.environ | {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": poll_s,
        "RAY_TRAIN_V2_ENABLED": "1",
    }
    rng = random.Random(0)  # noqa: S311
    kills: list[Json] = []
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            for _ in range(num_kills):
                kill = _kill_one(folder, rng, process)
                if kill is None:
                    note(f"Ray Train did not come back; see {folder / 'log'}")
                    break
                kills.append(kill)
                note(
                    f"Ray Train: rank {kill['rank']} killed after step {kill['step']}: next step "
                    f"{kill['next_s']:.2f} s, regained {kill['regain_s']:.2f} s"
                )
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    return kills


def _kill_one(folder: Path, rng: random.Random, process: subprocess.Popen[bytes]) -> Json | None:
    """Let the present attempt do some steps, kill a rank, wait for the next attempt's steps."""
    num_before = len(_lines(folder))
    wanted = num_before + rng.randrange(6, 12)
    if not _wait(lambda: len(_lines(folder)) >= wanted, process):
        return None
    rank = rng.randrange(2)
    pid = int((folder / f"pid-{rank}").read_text())
    time.sleep(rng.uniform(0, 0.05))
    killed_s = time.time()
    os.kill(pid, signal.SIGKILL)
    attempt = _lines(folder)[-1]["attempt"]
    last = _lines(folder)[-1]["step"]

    def newer() -> list[Json]:
        return [line for line in _lines(folder) if line["attempt"] > attempt]

    if not _wait(lambda: any(line["step"] > last for line in newer()), process):
        return None
    return {
        "rank": rank,
        "step": last,
        "next_s": newer()[0]["time"] - killed_s,
        "regain_s": next(line["time"] for line in newer() if line["step"] > last) - killed_s,
    }


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline_s or process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def _lines(folder: Path) -> list[Json]:
    path = folder / "steps.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _train(settings: Json) -> None:
    """Train as one worker of a TorchTrainer; the loop is the one of Ray's own guide."""
    import ray.train
    import torch
    from torch.nn.functional import cross_entropy

    from gangline.comm.mesh import Mesh
    from gangline.orchestrator.job import load_job
    from gangline.trainers.data import TokenDataset, prepare_dataset, share_of_batch
    from gangline.trainers.initialize import initialize
    from gangline.trainers.model import Transformer
    from gangline.trainers.parallelize import parallelize

    torch.set_num_threads(1)
    job: Any = load_job(settings["job"] + "\n")
    folder = Path(settings["folder"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    batch_size = job.training.batch_size
    info = prepare_dataset(job.data, folder / "cache")
    dataset = TokenDataset(info, seq_len=job.data.seq_len, seed=0, validation_fraction=0.01)
    model = Transformer(job.model, vocab_size=info.vocab_size, max_positions=job.data.seq_len)
    parallelize(model, Mesh.single(), job.mesh)
    initialize(model, 0)
    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=job.optimizer.lr)
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as path:
            state = torch.load(Path(path) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    attempt = time.time_ns()
    while True:
        first, last = share_of_batch(step * batch_size, batch_size, rank, world_size)
        tokens = dataset.tokens(dataset.sample_ids(first, last - first))
        logits, _ = ddp(tokens[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if rank == 0:
            line = {"step": step, "time": time.time(), "attempt": attempt, "loss": loss.item()}
            with open(folder / "steps.jsonl", "ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")
        if step % job.checkpoint.every_steps == 0:
            _report(step, model, optimizer, rank)


def _report(step: int, model: Any, optimizer: Any, rank: int) -> None:
    import ray.train
    import torch

    with tempfile.TemporaryDirectory() as path:
        checkpoint = None
        if rank == 0:
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, Path(path) / "state.pt")
            checkpoint = ray.train.Checkpoint.from_directory(path)
        ray.train.report({"step": step}, checkpoint=checkpoint)


def main() -> None:
    """Run the TorchTrainer of one setting in its own private Ray until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_kills", type=int)
    options = parser.parse_args()
    with connect(None, namespace="ray-train", min_cpus=4):
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        TorchTrainer(
            _train,
            train_loop_config={
                "folder": str(options.folder),
                "job": (options.folder / "job.json").read_text(),
            },
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=2, resources_per_worker={"CPU": 0.5}
            ),
            run_config=ray.train.RunConfig(
                name="peer",
                storage_path=str(options.folder / "storage"),
                failure_config=ray.train.FailureConfig(max_failures=options.num_kills + 1),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
        ).fit()


if __name__ == "__main__":
    main()
