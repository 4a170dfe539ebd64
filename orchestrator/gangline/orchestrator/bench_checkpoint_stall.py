"""What a checkpoint every ten steps costs the training: blocks with and without, interleaved.

Two gloo ranks train a model of 1.5 million parameters with AdamW, all of it replicated (18 MB a
checkpoint), at about 0.3 s a step. A block is five steps. A round has one block per arm, in an
order drawn from the seed, the same on both ranks; a save comes after the first step of its block,
and the block ends when the save is finished, also in the background. So the whole cost of a save is
the difference to the block without one, of the same round; it is charged to ten steps of 0.3 s,
whatever they took here. (Blocks of ten steps would measure the same difference with more noise per
second of measuring.)

Where other processes run beside the test, their processor time is measured too, and what they had
more in one block than in the other is taken out of the difference, divided by the number of cores:
on a machine whose cores are all busy a second of somebody else costs so much. (Fitted to 41 rounds
on 2 cores at a load of 3 to 7: 0.50 s a second.) On an idle machine this changes nothing.

Beside the ratio stands what was accounted for: the seconds that `save` kept the training waiting,
and the processor seconds of the background thread, as a share of ten steps. On fully busy cores the
cost cannot be much more than both together.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from gangline.comm.collectives import all_reduce, barrier, broadcast
from gangline.comm.mesh import Mesh, open_store
from gangline.orchestrator.bench_checkpoint_subjects import end_child, fork_child, quiet_dcp
from gangline.trainers.checkpoint import Checkpointer, Shard, State

WORLD_SIZE = 2
STEPS_PER_BLOCK = 5
STEPS_PER_SAVE = 10  # the cadence that the cost is charged to
_WIDTH, _LAYERS = 512, 6  # 1.58 million parameters
STEP_S = 0.3
_PROBE_ROWS = 2048
_MICROBATCHES = 8  # so that Python has as much to do in a step as it has in a real one
_NUM_BOOTSTRAPS = 2000
NO_CHECKPOINT = "no checkpoint"
OURS = "gangline"
Save = Callable[[int], dict[str, float]]


class _Training:
    """A training-like loop: forward, backward, all-reduce, AdamW, on one thread."""

    def __init__(self, mesh: Mesh) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(_LAYERS):
            layers += [nn.Linear(_WIDTH, _WIDTH), nn.GELU()]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._mesh = mesh
        self._rows = torch.randn(_PROBE_ROWS, _WIDTH)
        self._rows = torch.randn(self._calibrated_rows(), _WIDTH)

    def _calibrated_rows(self) -> int:
        times_s = []
        for _ in range(5):
            started_s = time.monotonic()
            self.step()
            times_s.append(time.monotonic() - started_s)
        rows = torch.tensor([_PROBE_ROWS * STEP_S / min(times_s)])
        broadcast(rows, self._mesh, "world", root=0).wait()
        return max(64, min(1 << 15, int(rows.item())))

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        for rows in self._rows.chunk(_MICROBATCHES):
            (self.model(rows) - rows).square().mean().backward()
        grads = torch.cat([cast(Tensor, p.grad).view(-1) for p in self.model.parameters()])
        all_reduce(grads, self._mesh, "world").wait()
        grads /= self._mesh.world_size
        for p, part in zip(
            self.model.parameters(),
            grads.split([p.numel() for p in self.model.parameters()]),
            strict=True,
        ):
            cast(Tensor, p.grad).view(-1).copy_(part)
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        found = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq", "step"):
                found[f"optimizer.{name}.{key}"] = self.optimizer.state[p][key]
        return found


def _our_save(training: _Training, mesh: Mesh, root: Path) -> tuple[Save, Callable[[], None]]:
    state: State = {n: Shard.whole(t) for n, t in training.tensors().items()}
    saver = Checkpointer(root, mesh=mesh, keep=2, asynchronous=True, config_digest="bench")
    told: dict[str, float] = {}

    def finish() -> None:
        assert saver.wait(60), "a save was not finished within 60 s"
        for event in saver.poll():
            assert event.status == "committed", event.reason
            told.update(event.parts_s, background=event.parts_s["total"])

    def save(step: int) -> dict[str, float]:
        started_s = time.monotonic()
        saver.save(step, state, {"cursor": step})
        told["blocked"] = time.monotonic() - started_s
        return told

    save(1)
    finish()
    return save, finish


def _dcp_save(
    training: _Training, mesh: Mesh, root: Path, *, asynchronous: bool
) -> tuple[Save, Callable[[], None]]:
    pending: list[Any] = []
    told: dict[str, float] = {}

    def finish() -> None:
        for future in pending:
            future.result()
        pending.clear()
        if mesh.rank == 0:
            for old in sorted(root.glob("step-*"))[:-2]:
                shutil.rmtree(old)

    def save(step: int) -> dict[str, float]:
        started_s = time.monotonic()
        state: dict[str, Any] = dict(training.tensors())
        folder, group = root / f"step-{step:08d}", mesh.group("checkpoint")
        with quiet_dcp():
            if asynchronous:
                pending.append(dcp_async_save(state, checkpoint_id=folder, process_group=group))
            else:
                dcp_save(state, checkpoint_id=folder, process_group=group)
        told["blocked"] = time.monotonic() - started_s
        return told

    save(1)
    finish()
    return save, finish


def _rank(mesh: Mesh, work: Path, seed: int, num_rounds: int, arms: list[str]) -> dict[str, Any]:
    training = _Training(mesh)
    makers: dict[str, Callable[[Path], tuple[Save, Callable[[], None]]]] = {
        OURS: lambda root: _our_save(training, mesh, root),
        "DCP save": lambda root: _dcp_save(training, mesh, root, asynchronous=False),
        "DCP async_save": lambda root: _dcp_save(training, mesh, root, asynchronous=True),
    }
    saves: dict[str, tuple[Save, Callable[[], None]]] = {}
    for number, arm in enumerate(arms):
        if arm != NO_CHECKPOINT:
            saves[arm] = makers[arm](work / f"arm-{number}")
    rng = random.Random(seed)  # noqa: S311 - a replayable draw, not a secret
    block_s: dict[str, list[float]] = {arm: [] for arm in arms}
    cpu_s: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    parts: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for round_number in range(-1, num_rounds):  # round -1 warms up
        for arm in rng.sample(arms, len(arms)):
            barrier(mesh, "world")
            started_s, (machine_s, own_s) = time.monotonic(), _cpu_s()
            told: dict[str, float] = {}
            for step in range(STEPS_PER_BLOCK):
                training.step()
                if step == 0 and arm in saves:
                    told = saves[arm][0](round_number + 3)
            if arm in saves:
                saves[arm][1]()
            barrier(mesh, "world")
            if round_number >= 0:
                block_s[arm].append(time.monotonic() - started_s)
                now_machine_s, now_own_s = _cpu_s()
                cpu_s[arm].append((now_machine_s - machine_s, now_own_s - own_s))
                parts[arm].append(dict(told))
    return {"block_s": block_s, "cpu_s": cpu_s, "parts": parts}


def _cpu_s() -> tuple[float, float]:
    """Return the processor seconds of the whole machine, and of this process, so far."""
    user, nice, system, _, _, irq, softirq = map(int, _proc_stat()[:7])
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks_per_s, time.process_time()


def _proc_stat() -> list[str]:
    with open("/proc/stat") as file:
        return file.readline().split()[1:]


def _others_s(told: list[dict[str, Any]], arm: str, round_number: int) -> float:
    """Return the processor seconds that other processes had during a block."""
    machine_s = told[0]["cpu_s"][arm][round_number][0]
    return float(machine_s - sum(rank["cpu_s"][arm][round_number][1] for rank in told))


def run_stall(work: Path, *, seed: int, num_rounds: int, arms: list[str]) -> dict[str, Any]:
    """Run the ranks and compare each arm with the one without checkpoints, round by round.

    Returns: per arm the median cost of a save, what that makes of ten steps of 0.3 s (with a 95 %
    bootstrap interval), and the accounted-for share of them.
    """
    work.mkdir(parents=True, exist_ok=True)
    store, port = open_store(WORLD_SIZE)
    pids = []
    for rank in range(WORLD_SIZE):
        pid = fork_child()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                mesh = Mesh.join(
                    rank=rank, world_size=WORLD_SIZE, store_host="127.0.0.1", store_port=port,
                    generation=1, timeout_s=120.0,
                )  # fmt: skip
                told = _rank(mesh, work, seed, num_rounds, [NO_CHECKPOINT, *arms])
                (work / f"rank-{rank}.json").write_text(json.dumps(told))
                code = 0
            finally:
                end_child(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    del store
    if any(codes):
        raise RuntimeError(f"the ranks of the stall test ended with {codes}")
    of_ranks = [json.loads((work / f"rank-{r}.json").read_text()) for r in range(WORLD_SIZE)]
    return {arm: _compare(arm, of_ranks, seed) for arm in [NO_CHECKPOINT, *arms]}


def _compare(arm: str, told: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    blocks = told[0]["block_s"][arm]
    result: dict[str, Any] = {
        "num_blocks": len(blocks),
        "step_s": statistics.median(blocks) / STEPS_PER_BLOCK,
    }
    if arm == NO_CHECKPOINT:
        return result
    num_cpus = os.cpu_count() or 1
    costs, others = [], []
    for n, (block_s, bare_s) in enumerate(
        zip(blocks, told[0]["block_s"][NO_CHECKPOINT], strict=True)
    ):
        with_s = _others_s(told, arm, n) / num_cpus
        without_s = _others_s(told, NO_CHECKPOINT, n) / num_cpus
        costs.append((block_s - with_s) - (bare_s - without_s))
        others.append((with_s + without_s) / (block_s + bare_s))
    rng = random.Random(seed)  # noqa: S311 - as above
    medians = sorted(
        statistics.median(rng.choices(costs, k=len(costs))) for _ in range(_NUM_BOOTSTRAPS)
    )

    def ratio(cost_s: float) -> float:
        return 1 + cost_s / (STEPS_PER_SAVE * STEP_S)

    result |= {
        "others_share": statistics.median(others),
        "cost_ms": 1e3 * statistics.median(costs),
        "ratio": ratio(statistics.median(costs)),
        "ratio_low": ratio(medians[int(0.025 * _NUM_BOOTSTRAPS)]),
        "ratio_high": ratio(medians[int(0.975 * _NUM_BOOTSTRAPS)]),
    }
    saves = [part for rank in told for part in rank["parts"][arm]]
    for key in ("blocked", "cpu", "background"):
        values = [part[key] for part in saves if key in part]
        if values:
            result[f"{key}_ms"] = 1e3 * statistics.median(values)
    if "cpu_ms" in result:
        busy_s = 1e-3 * (result["blocked_ms"] + result["cpu_ms"])
        result["accounted_share"] = busy_s / (STEPS_PER_SAVE * STEP_S)
    return result
