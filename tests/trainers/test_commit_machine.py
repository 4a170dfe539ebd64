"""The commit protocol as a state machine: any order of writers, fences, cleaning and damage."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from gangline.trainers.commit import (
    CommitFence,
    StaleGenerationError,
    begin,
    commit,
    newest,
    step_folders,
    step_name,
    verify,
    write_durable,
)
from gangline.trainers.commit_layout import Chunk, TensorLayout, file_layouts
from gangline.trainers.commit_manifest import MANIFEST_NAME, Manifest, encode
from gangline.trainers.commit_retention import Retention, clean

FILE = "rank-00000-000.safetensors"
KEEP = 2
STEPS = st.integers(1, 6)


class CommitMachine(RuleBasedStateMachine):
    """Follow what was acknowledged, and compare it with what is on the disk."""

    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        # In memory where there is such a folder: a sync costs nothing there.
        self.root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.fence = CommitFence(self.root)
        self.fence.advance(1)
        self.admitted = 1
        self.retention = Retention(self.root, keep=KEEP)
        self.acknowledged: dict[int, int] = {}  # step -> generation whose bytes they are
        self.damaged: set[int] = set()
        self.committed: set[Path] = set()
        self.num_attempts = 0

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(target=attempts, step=STEPS, back=st.integers(0, 2))
    def write(self, step: int, back: int) -> tuple[Path, int, int]:
        """Write an attempt, as a writer of this or of an older generation."""
        generation = max(1, self.admitted - back)
        self.num_attempts += 1
        folder = begin(
            self.root, step=step, generation=generation, attempt=f"{self.num_attempts:x}"
        )
        tensors = {"w": TensorLayout("U8", (4,), (Chunk((0,), (4,), FILE),))}
        (layout,) = file_layouts(tensors).values()
        data = bytes([generation]) * 4
        record = write_durable(folder, FILE, [layout.header, data]).record
        manifest = Manifest(step, generation, 1, {}, "", 0.0, {}, {FILE: record}, tensors)
        write_durable(folder, MANIFEST_NAME, [encode(manifest)])
        return folder, step, generation

    @rule(attempt=attempts)
    def commit_attempt(self, attempt: tuple[Path, int, int]) -> None:
        """Commit; possibly again, possibly long after it was fenced."""
        folder, step, generation = attempt
        existed = folder.exists()
        if generation == self.admitted:
            assert existed == (folder not in self.committed), "an attempt was cleaned under way"
        try:
            outcome = commit(folder, step=step, generation=generation, fence=self.fence)
        except StaleGenerationError:
            assert generation < self.admitted or not existed
            return
        self.committed.add(folder)
        assert generation >= self.admitted, "a stale commit"
        assert outcome.kept == (step in self.acknowledged and step not in self.damaged)
        if not outcome.kept:
            self.acknowledged[step] = generation
            self.damaged.discard(step)
            self.retention.remember(outcome.path)

    @rule(step=STEPS, back=st.sampled_from([0, 0, 1]))
    def save(self, step: int, back: int) -> None:
        """Write and commit at once, which is what happens most."""
        self.commit_attempt(self.write(step, back))

    @rule(by=st.sampled_from([1, 2, 0, -1]))
    def advance(self, by: int) -> None:
        if by < 0:
            with pytest.raises(StaleGenerationError):
                self.fence.advance(self.admitted + by)
            return
        self.admitted += by
        self.fence.advance(self.admitted)

    @rule()
    def restart(self) -> None:
        """Forget what a process knows and clean up, as a new one does."""
        self.retention = Retention(self.root, keep=KEEP)
        clean(self.root, generation=self.admitted)

    @rule()
    def prune(self) -> None:
        removed = {int(p.name[5:]) for p in self.retention.prune(
            generation=self.admitted, fence=self.fence)}  # fmt: skip
        good = sorted(self.acknowledged.keys() - self.damaged, reverse=True)
        if len(good) >= KEEP:
            expected = {step for step in self.acknowledged if step < good[KEEP - 1]}
        else:
            expected = set()
        assert removed == expected
        for step in removed:
            del self.acknowledged[step]
            self.damaged.discard(step)

    @rule(step=STEPS, position=st.integers(0, 3))
    def damage(self, step: int, position: int) -> None:
        if step in self.acknowledged and step not in self.damaged:
            file = self.root / step_name(step) / FILE
            data = bytearray(file.read_bytes())
            data[-1 - position] ^= 0x40
            file.write_bytes(data)
            self.damaged.add(step)

    @invariant()
    def every_acknowledged_step_is_there(self) -> None:
        on_disk = dict(step_folders(self.root))
        assert on_disk.keys() == self.acknowledged.keys()
        for step, path in on_disk.items():
            verification = verify(path)
            assert verification.ok == (step not in self.damaged)
            if verification.ok:
                assert verification.info is not None
                assert verification.info.generation == self.acknowledged[step]

    @invariant()
    def the_newest_good_one_is_found(self) -> None:
        info = newest(self.root)
        good = self.acknowledged.keys() - self.damaged
        assert (info.step if info else None) == max(good, default=None)

    @invariant()
    def there_is_always_a_fence(self) -> None:
        assert CommitFence(self.root).generation == self.admitted


TestCommitMachine = CommitMachine.TestCase
TestCommitMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
