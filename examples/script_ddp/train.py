"""Train a small network with plain DistributedDataParallel. Nothing in here knows Gangline.

It runs alone, under torchrun, and under `gangline run examples/script_ddp.yaml`:

    python train.py
    torchrun --nproc-per-node 2 train.py

What makes it survive a killed rank is ordinary care: it saves a checkpoint every few steps, never
leaves a half-written one behind, and goes on from the newest when it is started again. The batch of
a step depends on the step and the rank alone, so a run that was interrupted ends with the same
weights as one that was not.
"""

import argparse
import hashlib
import math
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    args = parse_args()
    # torchrun, and Gangline in its place, tell each process who it is. Without either of them
    # these are the values of a run of one process.
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device()
    torch.manual_seed(args.seed)

    start_group(rank, world_size, device)
    model: nn.Module = nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    first_step = load_checkpoint(args.checkpoint_dir, model, optimizer, device)
    if rank == 0:
        print(f"{world_size} ranks on {device}, starting at step {first_step}", flush=True)

    # From here on `backward` sums the gradients over all ranks.
    parallel = DistributedDataParallel(model)
    for step in range(first_step, args.steps):
        points, labels = spirals(args.seed, step, rank, args.batch_size, device)
        loss = nn.functional.cross_entropy(parallel(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done = step + 1
        if rank == 0 and (done % args.save_every == 0 or done == args.steps):
            # The state after step `done`; saving costs one rank a few milliseconds, and the others
            # wait for it in the next step's sum.
            save_checkpoint(args.checkpoint_dir, model, optimizer, done)
            print(f"step {done} loss {loss.item():.4f} saved", flush=True)
        time.sleep(args.step_sleep_s)

    if rank == 0:
        print(f"done: weights {weights_digest(model)}", flush=True)
    dist.destroy_process_group()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classify two spirals, on any number of ranks.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64, help="points of a step, per rank")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--step-sleep-s", type=float, default=0.0, help="make each step longer")
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        # Gangline gives each run a folder of its own; it stays the same when ranks are restarted.
        # On several machines it must be a folder that all of them see.
        default=Path(os.environ.get("GANGLINE_RUN_DIR", ".")) / "script_checkpoints",
    )
    return parser.parse_args()


def choose_device() -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def start_group(rank: int, world_size: int, device: torch.device) -> None:
    """Join the other ranks. The addresses come from MASTER_ADDR and MASTER_PORT."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        # A short timeout: if a rank is lost, the others should notice and end.
        dist.init_process_group(
            backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, rank=0, world_size=1, store=alone)


def spirals(
    seed: int, step: int, rank: int, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draw points of two interleaved spirals: the same for the same step and rank, always."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 65_537 + rank)
    labels = torch.randint(0, 2, (batch_size,), generator=generator)
    radius = torch.rand(batch_size, generator=generator)
    angle = 2 * math.pi * radius + math.pi * labels
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    points += 0.02 * torch.randn(batch_size, 2, generator=generator)
    return points.to(device), labels.to(device)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Replace the checkpoint in one move: whoever looks finds the old one or the new, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "newest.tmp"
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk, not only on its way there
    temporary.replace(folder / "newest.pt")
    folder_handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_handle)  # the new name, too
    finally:
        os.close(folder_handle)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> int:
    """Load the newest checkpoint, if there is one; return the number of steps already done."""
    path = folder / "newest.pt"
    step = torch.zeros(1, dtype=torch.int64, device=device)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step += state["step"]
    # Nobody saves between here and the first step, so all ranks see the same file, unless the
    # folder is not the same for all. Better to stop than to train apart.
    newest = step.clone()
    dist.all_reduce(newest, op=dist.ReduceOp.MAX)
    if newest.item() != step.item():
        raise RuntimeError(
            f"another rank loaded step {newest.item()} and this one step {step.item()} from "
            f"{folder}; set --checkpoint-dir to a folder that all ranks share"
        )
    return int(step.item())


def weights_digest(model: nn.Module) -> str:
    """Return a short digest of the weights, to compare two runs by."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
