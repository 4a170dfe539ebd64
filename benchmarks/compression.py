"""How fast are the compressors, how small their payloads, and what do they do to a training?

    .venv/bin/python benchmarks/compression.py speed
    sudo .venv/bin/python benchmarks/compression.py train --hosts 2 --rate-mbit 100

`speed` compresses and decompresses normal vectors on one thread. The compressors take turns within
each round, in a new order each time; GB/s are those of the vector, not of the payload. Nothing is
printed unless decoding gives the same bits twice and, on a shorter vector, the fast kernels give
those of the plain ones.

`train` brings up a lab of virtual hosts with one rank each and trains the model of
examples/moe_text.yaml on its text, data-parallel, for 200 steps, once with each way of summing the
gradients. The ways take turns step by step on the same samples, so the machine's other load is in
all; a step takes as long as its slowest rank. Bytes are counted at the host's interface, in one
direction, with all headers. Nothing is printed unless the ranks' weights agree to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SPEED = [
    {"kind": "identity"},
    {"kind": "top_k", "fraction": 0.001},
    {"kind": "top_k", "fraction": 0.01},
    {"kind": "top_k", "fraction": 0.1},
    {"kind": "rand_k", "fraction": 0.01},
    {"kind": "dithering", "bits": 1},
    {"kind": "dithering", "bits": 2},
    {"kind": "dithering", "bits": 4},
    {"kind": "dithering", "bits": 8},
    {"kind": "dithering", "bits": 4, "norm": "l2"},
    {"kind": "natural"},
    {"kind": "scaled_sign"},
    {"kind": "group_sign"},
]
# The part of the job file's optimizer that makes each way.
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "top 1 %": {"compression": {"kind": "top_k", "fraction": 0.01}},
    "top 1 % without feedback": {
        "compression": {"kind": "top_k", "fraction": 0.01},
        "error_feedback": False,
    },
    "4 bits": {"compression": {"kind": "dithering", "bits": 4}},
    "group sign": {"compression": {"kind": "group_sign"}},
}
# That of examples/moe_text.yaml, but data-parallel in all.
CONFIG: dict[str, Any] = {
    "model": {
        "dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 352,
        "moe": {"every": 2, "num_experts": 4, "top_k": 2},
    },
    "data": {"seq_len": 256},
    "optimizer": {"lr": 0.003, "warmup_steps": 20},
    "training": {"batch_size": 16},
}  # fmt: skip
TRANSMITTED = Path("/sys/class/net/eth0/statistics/tx_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    speed = modes.add_parser("speed")
    speed.add_argument("--sizes", default="1000000,25000000", help="elements of the vectors")
    speed.add_argument("--rounds", type=int, default=10)
    train = modes.add_parser("train")
    train.add_argument("--hosts", type=int, default=2)
    train.add_argument("--rate-mbit", type=float, default=100.0, help="of each host's link")
    train.add_argument("--steps", type=int, default=200)
    train.add_argument("--ways", default=",".join(WAYS))
    train.add_argument("--cache", type=Path, default=Path("runs/data"), help="tokenized text")
    train.add_argument("--json", type=Path, help="write all figures to this file")
    train.add_argument("--job", help=argparse.SUPPRESS)
    train.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode == "train" and args.job:
        rank_main(json.loads(args.job), args.rank)
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, commit "
        f"{commit or 'unknown'}"
    )
    if args.mode == "speed":
        for size in args.sizes.split(","):
            measure_speed(int(size), args.rounds)
    else:
        measure_training(args)


def label(settings: dict[str, Any]) -> str:
    """Return a short name of settings."""
    values = [str(value) for key, value in settings.items() if key != "kind"]
    return " ".join([settings["kind"], *values])


def measure_speed(num: int, num_rounds: int) -> None:
    """Time all compressors on one vector; print a table."""
    import torch

    from gangline.comm.compression_settings import CompressionSettings
    from gangline.comm.compressors import make

    torch.set_num_threads(1)
    check_kernels()
    x = torch.randn(num, generator=torch.Generator().manual_seed(0))
    ways = {label(s): make(CompressionSettings.model_validate(s)) for s in SPEED}
    payloads = {name: way.compress(x, seed=1) for name, way in ways.items()}
    for name, way in ways.items():
        first, again = (way.decompress(payloads[name], num) for _ in range(2))
        assert torch.equal(first, again), name
        assert payloads[name].numel() == way.payload_bytes(num), name
    packs: dict[str, list[float]] = {name: [] for name in ways}
    unpacks: dict[str, list[float]] = {name: [] for name in ways}
    order, rng = list(ways), random.Random(0)
    for _ in range(num_rounds):
        rng.shuffle(order)
        for name in order:
            started_s = time.perf_counter()
            ways[name].compress(x, seed=1)
            between_s = time.perf_counter()
            ways[name].decompress(payloads[name], num)
            packs[name].append(between_s - started_s)
            unpacks[name].append(time.perf_counter() - between_s)
    topk_s = min(timed(lambda: torch.topk(x.abs(), num // 100, sorted=False)) for _ in range(3))
    print(f"\n{num:,} elements ({4 * num / 1e6:.0f} MB), 1 thread, n = {num_rounds}")
    print(
        f"  {'':20} {'compress ms':>18} {'GB/s':>6} {'decompress ms':>18} {'GB/s':>6} "
        f"{'bits/element':>13} {'of fp32':>9}"
    )
    for name, way in ways.items():
        num_bytes = way.payload_bytes(num)
        print(
            f"  {name:20} {times_of(packs[name])} {rate(num, packs[name])} "
            f"{times_of(unpacks[name])} {rate(num, unpacks[name])} {8 * num_bytes / num:13.3f} "
            f"{4 * num / num_bytes:8.1f}x"
        )
    print(f"  torch.topk alone, 1 %: {topk_s * 1e3:.1f} ms")


def check_kernels() -> None:
    """Compare the fast kernels with the plain ones, bit for bit."""
    import torch

    from gangline.kernels import bitpack, compress

    x = torch.randn(200_001, generator=torch.Generator().manual_seed(1))
    scales = compress.bucket_max(x, 512)
    codes = compress.dither(x, scales, 512, 7, 1)
    pairs = [
        (compress.largest(x, 2000), compress.largest_ref(x, 2000)),
        (codes, compress.dither_ref(x, scales, 512, 7, 1)),
        (compress.round_to_powers(x, 1)[0], compress.round_to_powers_ref(x, 1)[0]),
        (bitpack.pack(codes, 4), bitpack.pack_ref(codes, 4)),
        (compress.undither(codes, scales, 512, 7), compress.undither_ref(codes, scales, 512, 7)),
    ]
    for number, (fast, plain) in enumerate(pairs):
        assert torch.equal(fast, plain), f"kernel {number} differs from its reference"


def timed(call: Any) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def times_of(times_s: list[float]) -> str:
    return f"{min(times_s) * 1e3:8.2f} / {statistics.median(times_s) * 1e3:7.2f}"


def rate(num: int, times_s: list[float]) -> str:
    return f"{4 * num / min(times_s) / 1e9:6.2f}"


def measure_training(args: argparse.Namespace) -> None:
    """Train in a lab with each way in turns; print times, bytes and losses."""
    from gangline.orchestrator.lab import Lab
    from gangline.orchestrator.lab_file import LabFile
    from gangline.trainers.config import DataConfig
    from gangline.trainers.data import prepare_dataset

    ways = args.ways.split(",")
    assert set(ways) <= set(WAYS), f"{ways} are not all of {list(WAYS)}"
    dataset = prepare_dataset(DataConfig(), args.cache, lambda line: None)
    lab_file = LabFile.model_validate(
        {
            "name": "compression", "hosts": args.hosts, "rate_mbit": args.rate_mbit,
            "ray": {"enabled": False},
        }
    )  # fmt: skip
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder, Lab.up(lab_file) as lab:
        hosts = list(lab.hosts.values())
        job = {
            "folder": folder, "store_host": hosts[0].ips[0], "world_size": args.hosts,
            "ways": ways, "num_steps": args.steps, "dataset": dataset.to_json(),
        }  # fmt: skip
        command = [sys.executable, __file__, "train", "--job", json.dumps(job), "--rank"]
        ranks = [
            host.popen([*command, str(rank)], env=environment) for rank, host in enumerate(hosts)
        ]
        for rank, process in enumerate(ranks):
            assert process.wait() == 0, f"rank {rank} failed"
        found = [json.loads(Path(folder, f"rank-{n}.json").read_text()) for n in range(args.hosts)]
    for name in ways:
        assert len({rank[name]["sha256"] for rank in found}) == 1, f"{name}: replicas differ"
    if args.json:
        args.json.write_text(json.dumps(found))
    report_training(args, ways, found)


def report_training(args: argparse.Namespace, ways: list[str], found: list[Any]) -> None:
    print(
        f"\n{args.hosts} hosts, {args.rate_mbit:g} Mbit/s links, {args.steps} steps, "
        f"{found[0]['num_parameters']:,} parameters"
    )
    print(
        f"  {'':26} {'min ms':>8} {'median':>8} {ways[0] + ' / this':>21} {'wire MB':>9} "
        f"{'link ms':>8} {'last losses':>12} {'held-out':>9}"
    )
    steps = {
        name: [max(turn) for turn in zip(*(rank[name]["times_s"] for rank in found), strict=True)]
        for name in ways
    }
    for name in ways:
        first = found[0][name]
        ratio, low, high = ratio_with_interval(steps[ways[0]], steps[name])
        # A run's loss of one step hangs on its batch, so the mean of the last 20.
        last = statistics.mean(first["losses"][-20:])
        print(
            f"  {name:26} {min(steps[name]) * 1e3:8.1f} {statistics.median(steps[name]) * 1e3:8.1f}"
            f" {ratio:6.2f} [{low:5.2f}, {high:5.2f}] {first['wire_bytes'] / 1e6:9.3f}"
            f" {first['wire_bytes'] * 8e-3 / args.rate_mbit:8.1f} {last:12.4f}"
            f" {first['held_out']:9.4f}"
        )


def ratio_with_interval(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Return the median of the paired ratios and its 95 % bootstrap interval."""
    ratios, rng = [a / b for a, b in zip(slow, fast, strict=True)], random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return statistics.median(ratios), medians[25], medians[974]


def rank_main(job: dict[str, Any], rank: int) -> None:
    """Be one rank: take all steps, and write what was found."""
    import torch

    from gangline.comm.collectives import barrier
    from gangline.comm.mesh import Mesh, open_store

    torch.set_num_threads(1)
    port_file = Path(job["folder"], "port")
    store = None
    if rank == 0:
        store, port = open_store(job["world_size"], host=job["store_host"])
        port_file.with_suffix(".new").write_text(str(port))
        port_file.with_suffix(".new").rename(port_file)
    while not port_file.exists():
        time.sleep(0.01)
    mesh = Mesh.join(
        rank=rank,
        world_size=job["world_size"],
        store_host=job["store_host"],
        store_port=int(port_file.read_text()),
        generation=0,
        timeout_s=300.0,
    )
    found = train(mesh, job)
    Path(job["folder"], f"rank-{rank}.json").write_text(json.dumps(found))
    barrier(mesh, "world")
    mesh.leave()
    del store


def train(mesh: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Take each step with every way in turns."""
    from gangline.comm.collectives import barrier
    from gangline.trainers.data import DatasetInfo, TokenDataset, share_of_batch
    from gangline.trainers.evaluate import evaluate
    from gangline.trainers.weights_digest import weights_sha256

    info = DatasetInfo.from_json(job["dataset"])
    batch_size = CONFIG["training"]["batch_size"]
    data = TokenDataset(info, seq_len=CONFIG["data"]["seq_len"], seed=0, validation_fraction=0.01)
    trainers = {name: new_trainer(WAYS[name], info.vocab_size, mesh, job) for name in job["ways"]}
    found: dict[str, Any] = {
        name: {"times_s": [], "losses": [], "wire_bytes": 0.0} for name in trainers
    }
    order, rng = list(trainers), random.Random(0)
    for step in range(job["num_steps"]):
        rng.shuffle(order)
        first, last = share_of_batch(step * batch_size, batch_size, mesh.rank, mesh.world_size)
        ids = data.sample_ids(first, last - first)
        for name in order:
            barrier(mesh, "world")
            sent, started_s = int(TRANSMITTED.read_text()), time.perf_counter()
            result, _ = trainers[name].train_step(data, ids)
            found[name]["times_s"].append(time.perf_counter() - started_s)
            sent = int(TRANSMITTED.read_text()) - sent
            found[name]["wire_bytes"] += sent / job["num_steps"]
            found[name]["losses"].append(result.loss)
    for name, trainer in trainers.items():
        held_out = evaluate(trainer.model, mesh, data, step=0, batch_size=batch_size)
        found[name]["held_out"] = held_out.loss
        found[name]["sha256"] = weights_sha256(trainer.flat.whole_weights(), mesh)
        found["num_parameters"] = sum(p.numel() for p in trainer.model.parameters())
    return found


def new_trainer(way: dict[str, Any], vocab_size: int, mesh: Any, job: dict[str, Any]) -> Any:
    """Return a trainer at the start of its run."""
    from gangline.trainers.config import TrainConfig
    from gangline.trainers.parallelize import reset
    from gangline.trainers.trainer import Trainer

    config = TrainConfig.model_validate(
        {
            **CONFIG,
            "optimizer": {**CONFIG["optimizer"], **way},
            "training": {**CONFIG["training"], "steps": job["num_steps"]},
        }
    )
    trainer = Trainer(config, vocab_size=vocab_size)
    trainer._attach(mesh)
    reset(trainer.model, trainer.flat, trainer.optimizer, mesh, seed=config.training.seed)
    return trainer


if __name__ == "__main__":
    main()
