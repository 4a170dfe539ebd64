"""Resume: at 40 random cut points bit for bit; over 20 changes of the number of workers no sample
lost and none taken twice.

A cut is a rank asked to stop, or one killed, on two ranks with the experts divided over them.
Each failure names its seed: `pytest tests/trainers/test_resume.py -k "seed_7-"` replays it alone.
"""

import random
from collections import Counter
from pathlib import Path

import pytest

from gangline.trainers.config import DataConfig
from gangline.trainers.data import TokenDataset, prepare_dataset
from gangline.trainers.ledger import read_ledger

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]
SCENARIOS = Path(__file__).with_name("trainer_scenarios.py")
NUM_STEPS = 24
NUM_CUTS = 40
NUM_CHANGES = 20
BATCH_SIZE = 6


def job(*, degree: int, num_steps: int) -> dict:
    return {
        "model": {
            "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24,
            "moe": {"num_experts": 4},
        },
        "data": {"seq_len": 16, "validation_fraction": 0.02},
        "optimizer": {"warmup_steps": 2, "lr": 0.01},
        "mesh": {"expert_parallel": degree},
        "checkpoint": {"every_steps": 4},
        "training": {"steps": num_steps, "batch_size": BATCH_SIZE},
    }  # fmt: skip


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"line {n} says {n * n % 97} and no more\n" for n in range(60))
    (folder / "text.txt").write_text(text)
    config = DataConfig(source=str(folder / "text.txt"))
    return prepare_dataset(config, folder / "cache", lambda line: None)


def run(rank_pool, info, config: dict, world_size: int, root: Path, may_die=(), **options):
    return rank_pool.run(
        world_size,
        (SCENARIOS, "train"),
        expert_parallel=config["mesh"]["expert_parallel"],
        may_die=may_die,
        config=config,
        dataset=info.to_json(),
        root=str(root),
        **options,
    )


_reference: dict = {}


@pytest.fixture
def reference(rank_pool, info, tmp_path: Path) -> dict:
    if not _reference:
        config = job(degree=2, num_steps=NUM_STEPS)
        _reference.update(run(rank_pool, info, config, 2, tmp_path / "reference")[0])
    return _reference


@pytest.mark.parametrize("seed", range(NUM_CUTS), ids=lambda seed: f"seed_{seed}-")
def test_a_cut_costs_no_bit(rank_pool, info, tmp_path: Path, reference: dict, seed: int) -> None:
    rng = random.Random(seed)
    fault = {"rank": rng.randrange(2), "step": rng.randrange(1, NUM_STEPS)}
    is_kill = seed % 2 == 1
    config = job(degree=2, num_steps=NUM_STEPS)
    if is_kill:
        may_die = (fault["rank"],)
        first = run(rank_pool, info, config, 2, tmp_path / "run", may_die, kill=fault)
        assert first[fault["rank"]] is None, f"the kill {fault} did not happen"
    else:
        first = run(rank_pool, info, config, 2, tmp_path / "run", stop=fault)
        assert first[0]["stopped"], f"the stop {fault} did not happen"
        assert first[0]["step"] == fault["step"]
    second = run(rank_pool, info, config, 2, tmp_path / "run")[0]
    resumed_at = NUM_STEPS - len(second["losses"])
    # A killed rank's newest save may have been in flight: then the one before it counts.
    newest = fault["step"] // 4 * 4
    allowed = {newest, max(0, newest - 4)} if is_kill else {fault["step"]}
    assert resumed_at in allowed, f"resumed at {resumed_at} after {fault}"
    assert second["losses"] == reference["losses"][resumed_at:]
    assert second["sha256"] == reference["sha256"]


def test_changes_of_the_number_of_workers_lose_no_sample(rank_pool, info, tmp_path: Path) -> None:
    rng = random.Random(0)
    num_steps = 4 * (NUM_CHANGES + 1)
    ledger = tmp_path / "ledger"
    worlds, step = [rng.randrange(1, 5)], 0
    while step < num_steps:
        world_size = worlds[-1]
        degree = rng.choice([d for d in (1, 2, 4) if world_size % d == 0])
        # The last one runs to the end.
        stop = step + rng.randrange(1, 6) if len(worlds) <= NUM_CHANGES else num_steps
        options = {"stop": {"rank": rng.randrange(world_size), "step": stop}}
        found = run(
            rank_pool,
            info,
            job(degree=degree, num_steps=num_steps),
            world_size,
            tmp_path / "run",
            ledger=str(ledger),
            **(options if stop < num_steps else {}),
        )
        step = found[0]["step"]
        assert step == stop
        worlds.append(rng.choice([n for n in (1, 2, 3, 4) if n != world_size]))
    assert len(worlds) - 2 == NUM_CHANGES, worlds
    dataset = TokenDataset(info, seq_len=16, seed=0, validation_fraction=0.02)
    wanted = {
        number + 1: dataset.sample_ids(number * BATCH_SIZE, BATCH_SIZE).tolist()
        for number in range(num_steps)
    }
    assert read_ledger(ledger) == wanted
    epochs = num_steps * BATCH_SIZE / dataset.num_samples
    assert epochs > 2, "the changes must cross the ends of epochs"
    taken = Counter(sample for ids in wanted.values() for sample in ids)
    assert max(taken.values()) - min(taken.values()) <= 1
