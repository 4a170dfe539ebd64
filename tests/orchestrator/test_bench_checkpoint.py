"""The bench itself: that it breaks things, sees losses, and says what is missing."""

import io
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gangline.orchestrator import bench_checkpoint_puppet
from gangline.orchestrator.bench_checkpoint import QUICK, run_bench
from gangline.orchestrator.bench_checkpoint_calls import (
    run_error_at_every_call,
    run_kill_at_every_call,
)
from gangline.orchestrator.bench_checkpoint_damage import run_damage
from gangline.orchestrator.bench_checkpoint_kill import Tally, run_kills
from gangline.orchestrator.bench_checkpoint_mounts import missing
from gangline.orchestrator.bench_checkpoint_power import run_power_cuts
from gangline.orchestrator.bench_checkpoint_space import run_budgets
from gangline.orchestrator.bench_checkpoint_subjects import Found, Ours, Session, Stock

TINY = replace(QUICK, kills=4, stock_kills=0, flips=40, stock_flips=20)
needs_strace = pytest.mark.skipif(
    bench_checkpoint_puppet.missing() is not None, reason=str(bench_checkpoint_puppet.missing())
)
needs_loop = pytest.mark.skipif(missing(loop=True) is not None, reason=str(missing(loop=True)))


class Liar:
    """Acknowledge every step, and keep only the first."""

    name = "liar"
    num_elements = 16

    def __init__(self) -> None:
        self._inner = Ours(num_elements=16)

    def start(self, root: Path, generation: int) -> Session:
        inner = self._inner.start(root, generation)

        class LyingSession:
            def save(self, step: int) -> None:
                time.sleep(0.002)
                if step == 1:
                    inner.save(step)

            def close(self) -> None:
                inner.close()

        return LyingSession()

    def find(self, root: Path) -> Found:
        return self._inner.find(root)

    def folder(self, root: Path) -> Path:
        return self._inner.folder(root)


def run(**options: Any) -> tuple[dict[str, Any], str, str]:
    out, err = io.StringIO(), io.StringIO()
    result = run_bench(quick=True, out=out, err=err, **options)
    return result, out.getvalue(), err.getvalue()


def test_a_small_run_counts_its_faults_and_writes_one_json_value() -> None:
    result, out, err = run(json=True, only=("kill", "damage"), amount=TINY, seed=3)
    assert json.loads(out) == json.loads(json.dumps(result))
    assert result["ok"]
    kill, damage = result["parts"]["kill"]["gangline"], result["parts"]["damage"]["gangline"]
    assert kill["num_faults"] == kill["outcomes"]["ok"] == 4
    assert kill["num_acknowledged"] >= 1
    assert damage["num_faults"] == damage["outcomes"]["ok"] >= 40
    assert damage["flips_by_file"]["manifest.json"] >= 1
    assert "SIGKILL at a random instant" in err
    stock = result["parts"]["damage"]["DCP, folder per step"]
    assert stock["outcomes"].get("loaded wrong", 0) > 0, "the damage is not felt by anybody"


def test_the_table_is_the_data_without_json() -> None:
    result, out, _ = run(json=False, only=("damage",), amount=TINY)
    assert "damaged file" in out
    assert out.rstrip().endswith("ok")
    assert result["parts"].keys() == {"damage"}


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    make = tempfile.mkdtemp

    def mkdtemp(**options: Any) -> str:
        made.append(Path(make(**{**options, "dir": tmp_path})))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    run(json=True, only=("damage",), amount=TINY)
    assert len(made) == 2
    assert not list(tmp_path.iterdir())


def test_a_lost_step_is_seen_and_told_with_a_command(tmp_path: Path) -> None:
    tally = run_kills(Liar(), tmp_path, seed=0, num_kills=6)
    assert tally.outcomes["lost"] > 0
    assert not tally.is_clean()
    assert "--only kill --seed 0 --first" in tally.failures[0]


def test_no_fault_is_no_success() -> None:
    assert not Tally().is_clean()
    assert not Tally(num_faults=1, outcomes=Tally().outcomes.__class__(ok=1)).is_clean()


def test_what_is_missing_is_said_and_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    result, out, _ = run(json=False, only=("calls",), amount=TINY)
    assert "apt-get install strace" in out
    assert not result["ok"]


def test_a_part_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="no part typhoon"):
        run(json=True, only=("typhoon",))


@needs_strace
def test_a_kill_and_an_error_at_one_call(tmp_path: Path) -> None:
    killed = run_kill_at_every_call(Ours(num_elements=16), tmp_path, only="rename#1")
    assert killed.num_faults == 1
    assert killed.is_clean()
    refused = run_error_at_every_call(Ours(num_elements=16), tmp_path, "ENOSPC", only="fsync#2")
    assert refused.more["saves_refused"] == 1
    assert refused.is_clean()
    torn = run_kill_at_every_call(Stock(per_step=True, num_elements=16), tmp_path, only="rename#1")
    assert torn.outcomes["unloadable"] == 1, "the harness does not see what it is there to see"


@needs_loop
def test_power_cuts_are_felt_by_what_is_not_synced(tmp_path: Path) -> None:
    ours = run_power_cuts(Ours(num_elements=16), tmp_path, seed=0, num_cuts=3)
    assert ours.is_clean()
    assert ours.num_faults == 3
    stock = run_power_cuts(Stock(per_step=True, num_elements=16), tmp_path, seed=0, num_cuts=3)
    assert stock.outcomes["unloadable"] > 0, "the harness does not see what it is there to see"


@pytest.mark.skipif(missing(loop=False) is not None, reason=str(missing(loop=False)))
def test_a_full_disk_refuses_some_saves_and_loses_none(tmp_path: Path) -> None:
    tally = run_budgets(Ours(), tmp_path, step_bytes=128 << 10)
    assert tally.is_clean()
    assert 0 < tally.more["saves_refused"] < tally.num_faults


def test_damage_of_a_blind_reader_is_seen(tmp_path: Path) -> None:
    class Blind(Stock):
        """Load whatever is there."""

    tally = run_damage(Blind(per_step=True, num_elements=64), tmp_path, seed=0, num_flips=30)
    assert tally.outcomes["loaded wrong"] > 0
    assert not tally.is_clean()
