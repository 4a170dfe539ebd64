"""Checkpointer and load with one rank; several ranks are in test_checkpoint_ranks.py."""

import errno
import gc
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from gangline.comm.mesh import Mesh
from gangline.trainers import checkpoint_reader, checkpoint_storage
from gangline.trainers.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointEvent,
    CheckpointInfo,
    CorruptCheckpointError,
    Shard,
    StaleGenerationError,
    State,
    load,
    load_newest,
    newest,
    verify,
)
from gangline.trainers.checkpoint_plan import DTYPES, ShardLoadPlanner, ShardSavePlanner
from gangline.trainers.checkpoint_reader import SafetensorsReader
from gangline.trainers.checkpoint_storage import SafetensorsWriter
from gangline.trainers.commit import CommitFence, WriterLockedError, WrittenFile, write_durable
from gangline.trainers.commit_files import HEADER_DIFFERS, FileRecord
from gangline.trainers.commit_manifest import MANIFEST_NAME, decode, encode


def sample_state(seed: int = 0) -> State:
    """Make one tensor of every dtype and shape that is odd in some way."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, dtype in DTYPES.items():
        noise = torch.randint(0, 256, (3 * 5 * dtype.itemsize,), generator=generator)
        values = noise.to(torch.uint8).view(dtype).view(3, 5)
        state[f"of.{name}"] = Shard.whole(values)
    state["of.BOOL"] = Shard.whole(torch.tensor([[True, False, True]]))
    state["scalar"] = Shard.whole(torch.tensor(3.25 + seed, dtype=torch.float64))
    state["empty"] = Shard.whole(torch.empty(0, 7))
    state["transposed"] = Shard.whole(torch.randn(6, 4, generator=generator).t())
    state["parameter"] = Shard.whole(torch.nn.Parameter(torch.randn(9, generator=generator)))
    return state


def blank(state: State) -> State:
    """Make a state of the same layout, filled with what must not survive a load."""
    filled = {}
    for name, shard in state.items():
        raw = torch.full((shard.tensor.numel() * shard.tensor.element_size(),), 255)
        tensor = raw.to(torch.uint8).view(shard.tensor.dtype).view(shard.tensor.shape)
        filled[name] = Shard.whole(tensor)
    return filled


def bits(state: State) -> dict[str, str]:
    """Digest each tensor's bytes, so that NaN equals itself."""
    return {
        name: hashlib.sha256(
            shard.tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, shard in state.items()
    }


def checkpointer(root: Path, *, asynchronous: bool = False, generation: int = 1, **more: Any) -> (
    Checkpointer
):  # fmt: skip
    mesh = Mesh.single(generation=generation)
    return Checkpointer(
        root, mesh=mesh, keep=2, asynchronous=asynchronous, config_digest="d", **more
    )


def saved(root: Path, steps: Sequence[int], *, generation: int = 1, **more: Any) -> CheckpointInfo:
    """Save `steps`, each with its own contents, and return the newest."""
    saver = checkpointer(root, generation=generation, **more)
    for step in steps:
        saver.save(step, sample_state(step), {"cursor": step})
    saver.close()
    assert [e.status for e in saver.poll()] == ["committed"] * len(steps)
    info = newest(root)
    assert info is not None
    return info


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    info = saved(tmp_path, [10, 20], asynchronous=asynchronous)
    state = blank(sample_state(20))
    assert load(info, state, Mesh.single()) == {"cursor": 20}
    assert bits(state) == bits(sample_state(20))
    assert info.step == 20
    assert info.world_size == 1


def test_nothing_on_the_disk_is_pickled_and_safetensors_reads_it(tmp_path: Path) -> None:
    info = saved(tmp_path, [10])
    assert {p.suffix for p in info.path.iterdir()} == {".json", ".safetensors"}
    tensors = {k: v for f in info.path.glob("*.safetensors") for k, v in load_file(f).items()}
    expected = sample_state(10)
    assert tensors.keys() == expected.keys()
    assert bits({k: Shard.whole(v) for k, v in tensors.items()}) == bits(expected)


def test_the_state_may_change_as_soon_as_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()

    def wait_and_write(*args: Any) -> WrittenFile:
        may_write.wait(10)
        return write_durable(*args)

    monkeypatch.setattr(checkpoint_storage, "write_durable", wait_and_write)
    saver = checkpointer(tmp_path, asynchronous=True)
    state = sample_state(10)
    before = bits(state)
    saver.save(10, state, {})
    for shard in state.values():
        shard.tensor.detach().zero_()
    assert not saver.wait(0.01), "nothing was in flight, so this test shows nothing"
    may_write.set()
    saver.close()
    state = blank(sample_state(10))
    info = newest(tmp_path)
    assert info is not None
    load(info, state, Mesh.single())
    assert bits(state) == before


def test_a_save_waits_for_the_one_in_flight_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_and_write(*args: Any) -> WrittenFile:
        time.sleep(0.1)
        return write_durable(*args)

    monkeypatch.setattr(checkpoint_storage, "write_durable", wait_and_write)
    saver = checkpointer(tmp_path, asynchronous=True)
    for step in (10, 20):
        saver.save(step, sample_state(step), {})
    saver.close()
    first, second = saver.poll()
    assert (first.status, second.status) == ("committed", "committed")
    assert first.parts_s["wait"] < 0.05
    assert second.parts_s["wait"] > 0.1


def test_buffers_are_allocated_once(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    saver.save(10, sample_state(10), {})
    addresses = [i.data_ptr() for i in saver._planner._images.values()]
    saver.save(20, sample_state(20), {})
    assert [i.data_ptr() for i in saver._planner._images.values()] == addresses
    saver.close()
    state = blank(sample_state())
    load_newest(tmp_path, state, Mesh.single())
    assert bits(state) == bits(sample_state(20))


def test_large_states_are_cut_into_several_files(tmp_path: Path) -> None:
    info = saved(tmp_path, [10], max_file_bytes=200)
    assert len(list(info.path.glob("*.safetensors"))) > 3
    state = blank(sample_state(10))
    load(info, state, Mesh.single())
    assert bits(state) == bits(sample_state(10))


def test_retention_follows_the_commits(tmp_path: Path) -> None:
    saved(tmp_path, [10, 20, 30, 40])
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000030", "step-00000040"]


FAULTS: dict[str, Callable[[], OSError]] = {
    "no space": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "input/output error": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", ["writev", "fsync", "open", "rename", "mkdir"])
def test_a_failed_save_is_an_event_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, fault: str, call: str
) -> None:
    saver = checkpointer(tmp_path, asynchronous=asynchronous)
    saver.save(10, sample_state(10), {})
    saver.wait()
    with monkeypatch.context() as patch:
        original, num_calls = getattr(os, call), 0

        def fail(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if call == "open" and num_calls > 1:  # to remove the attempt takes an open, too
                return original(*args, **kwargs)
            raise FAULTS[fault]()

        patch.setattr(os, call, fail)
        saver.save(20, sample_state(20), {})
        saver.wait()
    info = newest(tmp_path)
    assert info is not None
    assert info.step == 10
    saver.save(30, sample_state(30), {})
    saver.close()
    events = saver.poll()
    assert [(e.step, e.status) for e in events] == [
        (10, "committed"), (20, "failed"), (30, "committed"),
    ]  # fmt: skip
    assert fault in events[1].reason.lower()
    assert not list(tmp_path.glob(".tmp-*")), "the failed attempt still takes room"


def test_a_full_disk_is_refused_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Status:
        f_frsize = 1
        f_bavail = 10

    saver = checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: Status)
        patch.setattr(os, "writev", lambda *_: pytest.fail("wrote"))
        saver.save(10, sample_state(), {})
    saver.close()
    (event,) = saver.poll()
    assert event.status == "failed"
    assert "10 bytes free" in event.reason
    assert str(tmp_path) in event.reason


def test_a_disk_that_hangs_stops_checkpoints_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    saver = checkpointer(tmp_path, asynchronous=True, timeout_s=0.05)
    monkeypatch.setattr(os, "fsync", lambda _: may_end.wait(20))
    started_s = time.monotonic()
    for step in (10, 20, 30):
        saver.save(step, sample_state(), {})
    saver.close(timeout_s=0.05)
    assert time.monotonic() - started_s < 5
    events = saver.poll()
    assert [(e.step, e.status) for e in events] == [(s, "failed") for s in (10, 20, 30)]
    assert all("step 10 was not saved within 0.05 s" in e.reason for e in events)
    may_end.set()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_folder_that_is_taken_away_is_an_event(tmp_path: Path, asynchronous: bool) -> None:
    saver = checkpointer(tmp_path / "root", asynchronous=asynchronous)
    saver.save(10, sample_state(), {})
    saver.wait()
    os.rename(tmp_path / "root", tmp_path / "away")
    saver.save(20, sample_state(), {})
    saver.wait()
    os.rename(tmp_path / "away", tmp_path / "root")
    saver.save(30, sample_state(), {})
    saver.close()
    events = saver.poll()
    assert [e.status for e in events] == ["committed", "failed", "committed"]
    assert "No such file" in events[1].reason
    assert not events[1].is_fenced


def test_a_folder_that_cannot_be_listed_is_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = checkpointer(tmp_path)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refuse)
    saver.save(10, sample_state(), {})
    (event,) = saver.poll()
    assert (event.status, event.is_fenced) == ("failed", False)
    assert "Permission denied" in event.reason
    saver.close()


def test_a_fault_of_ours_in_the_thread_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = checkpointer(tmp_path, asynchronous=True)
    monkeypatch.setattr(checkpoint_storage, "write_durable", lambda *_: 1 / 0)
    saver.save(10, sample_state(), {})
    assert saver.wait(5)
    (event,) = saver.poll()
    assert event.status == "failed"
    assert "ZeroDivisionError" in event.reason
    saver.close()


def test_a_fenced_checkpointer_commits_nothing(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, generation=1)
    saver.save(10, sample_state(), {})
    CommitFence(tmp_path).advance(2)
    saver.save(20, sample_state(), {})
    saver.close()
    first, second = saver.poll()
    assert (first.status, first.is_fenced) == ("committed", False)
    assert (second.status, second.is_fenced) == ("failed", True)
    assert "replaced by generation 2" in second.reason
    with pytest.raises(StaleGenerationError):
        checkpointer(tmp_path, generation=1)


def test_a_second_checkpointer_of_a_generation_is_refused(tmp_path: Path) -> None:
    first = checkpointer(tmp_path, generation=3)
    with pytest.raises(WriterLockedError):
        checkpointer(tmp_path, generation=3)
    checkpointer(tmp_path, generation=4).close()  # the first one has been fenced by this
    first.close()


def test_the_same_step_again_keeps_the_first(tmp_path: Path) -> None:
    saved(tmp_path, [10])
    saver = checkpointer(tmp_path, generation=2)
    saver.save(10, sample_state(99), {})
    saver.close()
    (event,) = saver.poll()
    assert event.status == "kept"
    state = blank(sample_state())
    load_newest(tmp_path, state, Mesh.single())
    assert bits(state) == bits(sample_state(10))


def test_what_a_dead_generation_left_is_cleaned(tmp_path: Path) -> None:
    saved(tmp_path, [10])
    (tmp_path / ".tmp-00000020-1-ab").mkdir()
    (tmp_path / ".tmp-00000020-1-ab" / "part").write_bytes(b"x")
    (tmp_path / ".trash-00000005-1-ab").mkdir()
    saver = checkpointer(tmp_path, generation=2, asynchronous=True)
    saver.close()
    assert not list(tmp_path.glob(".t*-*"))


def test_a_layout_that_changes_is_refused_by_name(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    saver.save(10, sample_state(), {})
    with pytest.raises(ValueError, match=r"'extra.weight'"):
        saver.save(20, {**sample_state(), "extra.weight": Shard.whole(torch.ones(2))}, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        saver.save(20, sample_state(), {"loss": float("nan")})
    saver.close()


@pytest.mark.parametrize(
    ("shard", "reason"),
    [
        (Shard(torch.ones(3), (4,), (2,)), "outside of its tensor"),
        (Shard(torch.ones(3), (4,), (-1,)), "outside of its tensor"),
        (Shard(torch.ones(3), (4, 4), (0, 0)), "outside of its tensor"),
        (Shard.whole(torch.ones(3, dtype=torch.complex64)), "complex64"),
    ],
)
def test_a_shard_that_cannot_be_is_refused(tmp_path: Path, shard: Shard, reason: str) -> None:
    saver = checkpointer(tmp_path)
    with pytest.raises(ValueError, match=reason):
        saver.save(10, {"w": shard}, {})
    saver.close()


def test_a_state_with_a_gap_is_refused_at_the_first_save(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="overlap or leave a gap"):
        saver.save(10, {"w": Shard(torch.ones(3), (4,), (0,))}, {})
    saver.close()


def wrong_states() -> dict[str, tuple[State, str]]:
    fit = blank(sample_state(10))
    without = {k: v for k, v in fit.items() if k != "scalar"}
    return {
        "shape": ({**fit, "parameter": Shard.whole(torch.ones(8))}, r"'parameter' is .* \(9,\)"),
        "dtype": ({**fit, "parameter": Shard.whole(torch.ones(9).half())}, "torch.float16"),
        "missing": ({**fit, "new.weight": Shard.whole(torch.ones(1))}, "no tensor 'new.weight'"),
        "unasked": (without, "such as 'scalar'"),
    }


@pytest.mark.parametrize("case", wrong_states())
def test_a_state_that_does_not_fit_is_named_and_not_touched(tmp_path: Path, case: str) -> None:
    saved(tmp_path, [5, 10])
    state, reason = wrong_states()[case]
    before = bits(state)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_newest(tmp_path, state, Mesh.single())
    assert not isinstance(caught.value, CorruptCheckpointError), (
        "an older step would not fit either"
    )
    assert bits(state) == before


def test_a_load_of_a_part_is_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, [10])
    state = {"scalar": blank(sample_state(10))["scalar"]}
    assert load_newest(tmp_path, state, Mesh.single(), strict=False) is not None
    assert state["scalar"].tensor.item() == 13.25


@pytest.mark.parametrize("max_held_bytes", [0, 1 << 30])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_held_bytes: int, damage: str
) -> None:
    monkeypatch.setattr(
        checkpoint_reader.SafetensorsReader.__init__, "__kwdefaults__",
        {"manifest_sha256": None, "max_held_bytes": max_held_bytes},
    )  # fmt: skip
    info = saved(tmp_path, [10, 20], max_file_bytes=200)
    file = sorted(info.path.glob("*.safetensors"))[-1]  # the last one that a load would read
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    file.unlink()
    if damage != "gone":
        file.write_bytes(data[: len(data) - (damage == "cut")])
    state = blank(sample_state(20))
    before = bits(state)
    with pytest.raises(CorruptCheckpointError, match=file.name):
        load(info, state, Mesh.single())
    assert bits(state) == before
    reports: list[str] = []
    loaded = load_newest(tmp_path, state, Mesh.single(), report=reports.append)
    assert loaded is not None
    assert loaded.step == 10
    assert bits(state) == bits(sample_state(10))
    assert len(reports) == 1
    assert file.name in reports[0]


def test_files_too_large_to_hold_are_verified_before_the_first_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint_reader.SafetensorsReader.__init__, "__kwdefaults__",
        {"manifest_sha256": None, "max_held_bytes": 0},
    )  # fmt: skip
    info = saved(tmp_path, [10], max_file_bytes=200)
    state = blank(sample_state(10))
    load(info, state, Mesh.single())
    assert bits(state) == bits(sample_state(10))


@pytest.mark.parametrize("max_held_bytes", [0, 1 << 30])
def test_a_header_that_lies_under_a_fitting_digest_is_refused(
    tmp_path: Path, max_held_bytes: int
) -> None:
    """Write what somebody would who computes digests on purpose: F32 bytes, called F16 inside."""
    saver = checkpointer(tmp_path)
    saver.save(10, {"w": Shard.whole(torch.ones(4))}, {})
    saver.close()
    manifest_file = tmp_path / "step-00000010" / MANIFEST_NAME
    manifest = decode(manifest_file.read_bytes(), manifest_file)
    (name,) = manifest.files
    file = manifest_file.parent / name
    data = file.read_bytes().replace(b'"dtype":"F32","shape":[4]', b'"dtype":"F16","shape":[8]')
    file.write_bytes(data)
    record = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    manifest_file.write_bytes(encode(replace(manifest, files={name: record})))
    assert verify(manifest_file.parent).problem == f"{name}: {HEADER_DIFFERS}"
    reader = SafetensorsReader(manifest_file.parent, max_held_bytes=max_held_bytes)
    planner = ShardLoadPlanner()
    planner.set_up_planner({"w": Shard.whole(torch.zeros(4))}, reader.read_metadata())
    with pytest.raises(CorruptCheckpointError, match="header"):
        reader.fetch(planner.create_local_plan())


def test_a_checkpoint_swapped_after_it_was_agreed_on_is_refused(tmp_path: Path) -> None:
    info = saved(tmp_path, [10])
    saved(tmp_path / "other", [10])
    (tmp_path / "step-00000010").rename(tmp_path / "away")
    (tmp_path / "other" / "step-00000010").rename(tmp_path / "step-00000010")
    assert verify(info.path).ok, "it is sound, only not the one that was agreed on"
    with pytest.raises(CorruptCheckpointError, match="agreed to load"):
        load(info, blank(sample_state()), Mesh.single())


def test_an_empty_root_has_nothing(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    assert load_newest(tmp_path / "none", sample_state(), Mesh.single()) is None


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_dcp_can_drive_our_planner_and_storage_to_the_same_bytes(tmp_path: Path) -> None:
    ours = saved(tmp_path / "ours", [10])
    root = tmp_path / "dcp"
    fence = CommitFence(root)
    fence.advance(1)
    writer = SafetensorsWriter(
        root, fence=fence, generation=1, axes={"world": 1}, config_digest="d"
    )
    state: dict[str, Any] = dict(sample_state(10))
    dcp_save(
        state, checkpoint_id="10", storage_writer=writer, planner=ShardSavePlanner(), no_dist=True
    )
    theirs = newest(root)
    assert theirs is not None
    for file in ours.path.glob("*.safetensors"):
        assert (theirs.path / file.name).read_bytes() == file.read_bytes()
    tensors: dict[str, Any] = {
        name: torch.zeros(shard.global_shape, dtype=shard.tensor.dtype)
        for name, shard in sample_state(10).items()
    }
    dcp_load(tensors, storage_reader=SafetensorsReader(ours.path), no_dist=True)
    assert bits({k: Shard.whole(v) for k, v in tensors.items()}) == bits(sample_state(10))


def test_a_closed_checkpointer_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    saver = checkpointer(tmp_path, asynchronous=True)
    saver.save(10, sample_state(), {})
    saver.close()
    saver.close()
    assert threading.active_count() == before
    saver.save(20, sample_state(), {})
    events: list[CheckpointEvent] = saver.poll()
    assert [e.status for e in events] == ["committed", "failed"]
    assert "is closed" in events[1].reason
    del saver
    gc.collect()
