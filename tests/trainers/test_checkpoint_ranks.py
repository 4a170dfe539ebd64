"""Checkpoints of several ranks: resharding between all world sizes, lost peers, damage in part."""

import os
import random
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gangline.comm.collectives import exchange_json
from gangline.comm.errors import CommError
from gangline.comm.mesh import Mesh, open_store
from gangline.trainers import checkpoint, checkpoint_storage
from gangline.trainers.checkpoint import (
    Checkpointer,
    CheckpointError,
    Shard,
    State,
    load,
    load_newest,
    newest,
)
from gangline.trainers.commit import CommitFence, WrittenFile, write_durable

pytestmark = pytest.mark.ranks

WORLDS = (1, 2, 3, 4)


def run_ranks(
    world_size: int, body: Callable[[Mesh], None], *, generation: int = 1, timeout_s: float = 30.0
) -> list[int]:
    """Run `body` on each rank of a gloo mesh in a child process; return the exit codes."""
    store, port = open_store(world_size)
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                mesh = Mesh.join(
                    rank=rank, world_size=world_size, store_host="127.0.0.1", store_port=port,
                    generation=generation, timeout_s=timeout_s,
                )  # fmt: skip
                body(mesh)
                code = 0
            except BaseException:  # noqa: BLE001 - the parent reads the exit code
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    del store
    return codes


def part(length: int, rank: int, world_size: int) -> tuple[int, int]:
    """Cut `length` into uneven parts; the last ranks of a short one get nothing."""
    size = -(-length // world_size)
    return min(rank * size, length), min((rank + 1) * size, length)


def full_tensors(step: int) -> dict[str, torch.Tensor]:
    """Make the whole state; every element is told apart by name, place and step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "embedding": torch.randn(13, 4, generator=generator),
        "experts.w1": torch.randn(8, 5, 3, generator=generator),
        "experts.w2": torch.randn(8, 3, 5, generator=generator).to(torch.bfloat16),
        "router": torch.randn(6, 11, generator=generator),
        "short": torch.randn(3, 2, generator=generator),
        "norm": torch.randn(7, generator=generator),
        "step": torch.tensor(float(step)),
    }


SHARDED_DIM = {"embedding": 0, "experts.w1": 0, "experts.w2": 0, "router": 1, "short": 0}


def shards_of(tensors: dict[str, torch.Tensor], rank: int, world_size: int) -> State:
    """Cut the sharded tensors for one rank; "norm" and "step" are replicated."""
    state: State = {}
    for name, tensor in tensors.items():
        dim = SHARDED_DIM.get(name)
        if dim is None:
            state[name] = Shard.whole(tensor.clone())
            continue
        first, last = part(tensor.shape[dim], rank, world_size)
        offset = tuple(first if d == dim else 0 for d in range(tensor.dim()))
        local = tensor.narrow(dim, first, last - first)
        state[name] = Shard(local.clone(), tuple(tensor.shape), offset)
    return state


def assert_equal(state: State, expected: State) -> None:
    for name, shard in expected.items():
        got, wanted = state[name].tensor, shard.tensor
        assert got.shape == wanted.shape
        assert torch.equal(_bytes(got), _bytes(wanted)), name


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def blank(state: State) -> State:
    return {
        name: Shard(torch.full_like(s.tensor, 77), s.global_shape, s.offset)
        for name, s in state.items()
    }


def save_on(mesh: Mesh, root: Path, steps: list[int], *, asynchronous: bool = True) -> list[Any]:
    saver = Checkpointer(root, mesh=mesh, keep=2, asynchronous=asynchronous, config_digest="d")
    for step in steps:
        state = shards_of(full_tensors(step), mesh.rank, mesh.world_size)
        saver.save(step, state, {"cursor": step})
    saver.close()
    return saver.poll()


def test_every_world_size_loads_what_every_world_size_saved(tmp_path: Path) -> None:
    for world_size in WORLDS:

        def save(mesh: Mesh, world_size: int = world_size) -> None:
            events = save_on(mesh, tmp_path / f"{world_size}", [10, 20])
            assert [e.status for e in events] == ["committed"] * 2
            assert all(e.num_bytes == events[0].num_bytes for e in events)

        assert run_ranks(world_size, save) == [0] * world_size
    sizes = {
        sum(f.stat().st_size for f in (tmp_path / f"{w}/step-00000020").glob("*.safetensors"))
        for w in WORLDS
    }
    # Replicated tensors are written once: only the headers differ.
    assert max(sizes) - min(sizes) < 4096
    for world_size in WORLDS:

        def check(mesh: Mesh, world_size: int = world_size) -> None:
            for saved_by in WORLDS:
                expected = shards_of(full_tensors(20), mesh.rank, world_size)
                state = blank(expected)
                info = newest(tmp_path / f"{saved_by}")
                assert info is not None
                assert info.world_size == saved_by
                assert load(info, state, mesh) == {"cursor": 20}
                assert_equal(state, expected)

        assert run_ranks(world_size, check) == [0] * world_size


def test_what_is_replicated_is_written_once_and_shared_out(tmp_path: Path) -> None:
    def save(mesh: Mesh) -> None:
        state = {f"w{i}": Shard.whole(torch.full((64, 64), float(i))) for i in range(8)}
        saver = Checkpointer(tmp_path, mesh=mesh, keep=2, asynchronous=False, config_digest="d")
        saver.save(10, state, {})
        saver.close()
        assert [e.status for e in saver.poll()] == ["committed"]

    assert run_ranks(3, save) == [0, 0, 0]
    files = sorted((tmp_path / "step-00000010").glob("*.safetensors"))
    tensor_bytes = 64 * 64 * 4
    assert [round(f.stat().st_size / tensor_bytes) for f in files] == [3, 3, 2]


def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks(tmp_path: Path) -> None:
    def body(mesh: Mesh) -> None:
        saver = Checkpointer(tmp_path, mesh=mesh, keep=2, asynchronous=True, config_digest="d")
        state = shards_of(full_tensors(10), mesh.rank, mesh.world_size)
        saver.save(10, state, {})
        saver.wait()
        if mesh.rank == 1:

            def fail(*_: Any) -> WrittenFile:
                raise OSError(28, "No space left on device")

            checkpoint_storage.__dict__["write_durable"] = fail
        saver.save(20, state, {})
        saver.wait()
        checkpoint_storage.__dict__["write_durable"] = write_durable
        saver.save(30, state, {})
        saver.close()
        events = saver.poll()
        assert [e.status for e in events] == ["committed", "failed", "committed"]
        assert "rank 1: [Errno 28] No space left" in events[1].reason

    assert run_ranks(2, body) == [0, 0]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000010", "step-00000030"]
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_peer_that_dies_in_a_save_costs_that_save_alone(tmp_path: Path, victim: int) -> None:
    def body(mesh: Mesh) -> None:
        saver = Checkpointer(tmp_path, mesh=mesh, keep=2, asynchronous=True, config_digest="d")
        state = shards_of(full_tensors(10), mesh.rank, mesh.world_size)
        saver.save(10, state, {})
        saver.wait()
        if mesh.rank == victim:

            def die(*_: Any) -> WrittenFile:
                os.kill(os.getpid(), signal.SIGKILL)
                raise AssertionError

            checkpoint_storage.__dict__["write_durable"] = die
        saver.save(20, state, {})
        started_s = time.monotonic()
        assert saver.wait(10), "the survivor hangs"
        assert time.monotonic() - started_s < 5
        saver.save(30, state, {})
        saver.close(timeout_s=5)
        events = saver.poll()
        assert [(e.step, e.status) for e in events] == [
            (10, "committed"), (20, "failed"), (30, "failed"),
        ]  # fmt: skip
        assert "a peer was lost" in events[1].reason
        assert "a peer was lost" in events[2].reason

    codes = run_ranks(2, body)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 0
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000010"]

    def go_on(mesh: Mesh) -> None:
        CommitFence(tmp_path).advance(2)
        state = blank(shards_of(full_tensors(10), mesh.rank, mesh.world_size))
        info = load_newest(tmp_path, state, mesh)
        assert info is not None
        assert info.step == 10
        assert_equal(state, shards_of(full_tensors(10), mesh.rank, mesh.world_size))
        assert [e.status for e in save_on(mesh, tmp_path, [20])] == ["committed"]

    assert run_ranks(1, go_on, generation=2) == [0]
    assert not list(tmp_path.glob(".t*-*"))


def kill_one_of_two(root: Path, seed: int) -> int:
    """Kill a random rank at a random instant; return the last step that rank 0 acknowledged."""
    rng = random.Random(seed)
    victim, delay_s = rng.randrange(2), rng.uniform(0.0, 0.1)
    read_end, write_end = os.pipe()

    def body(mesh: Mesh) -> None:
        saver = Checkpointer(root, mesh=mesh, keep=2, asynchronous=True, config_digest="d")
        if mesh.rank == victim:
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        for step in range(1, 1000):
            saver.save(step, shards_of(full_tensors(step), mesh.rank, mesh.world_size), {})
            saver.wait()
            events = saver.poll()
            if any(e.status == "failed" for e in events):
                assert "a peer was lost" in events[0].reason
                break
            if mesh.rank == 0:
                os.write(write_end, b"%d " % step)
        saver.close(timeout_s=5)

    codes = run_ranks(2, body)
    os.close(write_end)
    told = os.read(read_end, 1 << 16).split()
    os.close(read_end)
    assert codes[victim] == -signal.SIGKILL, f"seed {seed}: the kill did not happen"
    # A death at the very first save is an error of the mesh, not an event.
    assert codes[1 - victim] in (0, 1), f"seed {seed}: {codes}"
    return int(told[-1]) if told else 0


def check_kills(root: Path, seeds: range) -> None:
    num_acknowledged = 0
    for seed in seeds:
        acknowledged = kill_one_of_two(root / f"{seed}", seed)
        num_acknowledged += acknowledged
        info = newest(root / f"{seed}")
        assert (info.step if info else 0) >= acknowledged, f"seed {seed}: a step was lost"
        if info is not None:
            state = {n: Shard.whole(torch.zeros_like(t)) for n, t in full_tensors(0).items()}
            load(info, state, Mesh.single())
            assert_equal(state, {n: Shard.whole(t) for n, t in full_tensors(info.step).items()})
        shutil.rmtree(root / f"{seed}")
    assert num_acknowledged >= len(seeds), "hardly any progress: the kills came too early"


def test_a_random_rank_killed_at_a_random_instant_loses_nothing(tmp_path: Path) -> None:
    check_kills(tmp_path, range(8))


@pytest.mark.nightly
def test_many_random_ranks_killed_at_random_instants_lose_nothing(tmp_path: Path) -> None:
    check_kills(tmp_path, range(100, 400))


def test_a_peer_that_stops_in_a_save_is_given_up_with_its_mesh(tmp_path: Path) -> None:
    def body(mesh: Mesh) -> None:
        saver = Checkpointer(tmp_path, mesh=mesh, keep=2, asynchronous=True, config_digest="d")
        state = shards_of(full_tensors(10), mesh.rank, mesh.world_size)
        saver.save(10, state, {})
        saver.wait()
        if mesh.rank == 1:
            (tmp_path / "pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
            raise AssertionError("was continued")
        try:
            saver.save(20, state, {})
            assert not saver.wait(0.3), "the peer was not stopped"
            mesh.abort()  # as whoever notices the silence does
            started_s = time.monotonic()
            saver.close(timeout_s=10)
            assert time.monotonic() - started_s < 5
            assert [e.status for e in saver.poll()] == ["committed", "failed"]
        finally:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    assert run_ranks(2, body) == [0, -signal.SIGKILL]
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000010"]


def test_a_commit_whose_news_cannot_be_told_is_a_commit(tmp_path: Path) -> None:
    def body(mesh: Mesh) -> None:
        saver = Checkpointer(tmp_path, mesh=mesh, keep=2, asynchronous=True, config_digest="d")
        saver.save(10, shards_of(full_tensors(10), mesh.rank, mesh.world_size), {})
        saver.wait()
        num_exchanges = 0

        def exchange(*args: Any) -> Any:
            nonlocal num_exchanges
            num_exchanges += 1
            if mesh.rank == 1 and num_exchanges == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return exchange_json(*args)

        checkpoint.__dict__["exchange_json"] = exchange
        saver.save(20, shards_of(full_tensors(20), mesh.rank, mesh.world_size), {})
        saver.close(timeout_s=5)
        assert [e.status for e in saver.poll()] == ["committed", "committed"]

    assert run_ranks(2, body) == [0, -signal.SIGKILL]
    info = newest(tmp_path)
    assert info is not None
    assert info.step == 20


def test_damage_that_one_rank_sees_keeps_all_ranks_from_loading(tmp_path: Path) -> None:
    def save(mesh: Mesh) -> None:
        save_on(mesh, tmp_path, [10, 20])

    assert run_ranks(2, save) == [0, 0]
    file = tmp_path / "step-00000020" / "rank-00001-000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    def check(mesh: Mesh) -> None:
        # Only what rank 1 saved; so rank 0 has nothing to do with the damage.
        tensors = {"experts.w1": full_tensors(20)["experts.w1"]}
        expected = shards_of(tensors, mesh.rank, mesh.world_size)
        state = blank(expected)
        info = next(i for i in (newest(tmp_path),) if i)
        assert info.step == 10, "newest reads all files"
        reports: list[str] = []
        loaded = load_newest(tmp_path, state, mesh, report=reports.append, strict=False)
        assert loaded is not None
        assert loaded.step == 10
        assert len(reports) == 1
        assert "rank-00001-000.safetensors" in reports[0]
        assert ("seen by rank 1" in reports[0]) == (mesh.rank == 0)
        at_10 = {"experts.w1": full_tensors(10)["experts.w1"]}
        assert_equal(state, shards_of(at_10, mesh.rank, mesh.world_size))

    assert run_ranks(2, check) == [0, 0]


def test_shards_that_contradict_each_other_are_refused_on_all_ranks(tmp_path: Path) -> None:
    def body(mesh: Mesh) -> None:
        saver = Checkpointer(tmp_path, mesh=mesh, keep=2, asynchronous=False, config_digest="d")
        tensor = torch.ones(4, 2 + mesh.rank)
        with pytest.raises(CheckpointError, match="'w'"):
            saver.save(10, {"w": Shard.whole(tensor)}, {})

    assert run_ranks(2, body) == [0, 0]


def test_the_files_do_not_depend_on_the_order_of_names(tmp_path: Path) -> None:
    def body(mesh: Mesh) -> None:
        state = shards_of(full_tensors(10), mesh.rank, mesh.world_size)
        if mesh.rank == 1:
            state = dict(reversed(state.items()))
        saver = Checkpointer(tmp_path, mesh=mesh, keep=2, asynchronous=False, config_digest="d")
        saver.save(10, state, {})
        saver.close()
        loaded = blank(shards_of(full_tensors(10), mesh.rank, mesh.world_size))
        assert load_newest(tmp_path, loaded, mesh) is not None
        assert_equal(loaded, shards_of(full_tensors(10), mesh.rank, mesh.world_size))

    assert run_ranks(2, body) == [0, 0]


def test_a_peer_lost_at_the_first_save_is_an_error_of_the_mesh(tmp_path: Path) -> None:
    def body(mesh: Mesh) -> None:
        saver = Checkpointer(tmp_path, mesh=mesh, keep=2, asynchronous=True, config_digest="d")
        if mesh.rank == 1:
            os._exit(0)
        with pytest.raises(CommError):
            saver.save(10, shards_of(full_tensors(10), 0, 2), {})
        saver.close(timeout_s=5)

    assert run_ranks(2, body) == [0, 0]
