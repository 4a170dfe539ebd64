"""The commit protocol at the level of files: no torch, real processes where it matters."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gangline.trainers import commit_files
from gangline.trainers.commit import (
    CommitFence,
    CommitOutcome,
    CorruptCheckpointError,
    FolderLock,
    NoSpaceError,
    StaleGenerationError,
    WriterLockedError,
    begin,
    commit,
    list_checkpoints,
    lock_writer,
    newest,
    require_room,
    verify,
    write_durable,
)
from gangline.trainers.commit_layout import Chunk, TensorLayout, file_layouts
from gangline.trainers.commit_manifest import MANIFEST_NAME, Manifest, encode
from gangline.trainers.commit_retention import Retention, clean

FILES = ("rank-00000-000.safetensors", "rank-00001-000.safetensors")


def write_attempt(root: Path, step: int, generation: int, attempt: str = "a1") -> Path:
    """Write a complete attempt of two files, as two ranks would."""
    chunks = [Chunk((4 * r, 0), (4, 8), file) for r, file in enumerate(FILES)]
    tensors = {"w": TensorLayout("U8", (8, 8), tuple(chunks))}
    folder = begin(root, step=step, generation=generation, attempt=attempt)
    records = {}
    for file, layout in file_layouts(tensors).items():
        data = bytes([step % 256]) * layout.num_data_bytes
        records[file] = write_durable(folder, file, [layout.header, data]).record
    manifest = Manifest(
        step, generation, 2, {"world": 2}, "digest", 0.0, {"cursor": step}, records, tensors
    )
    write_durable(folder, MANIFEST_NAME, [encode(manifest)])
    return folder


def commit_step(root: Path, step: int, generation: int = 1) -> CommitOutcome:
    folder = write_attempt(root, step, generation)
    return commit(folder, step=step, generation=generation, fence=CommitFence(root))


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if not p.name.endswith(".lock"))


def flip(file: Path, position: int = 100) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints"
    CommitFence(folder).advance(1)
    return folder


def test_a_committed_step_is_found_and_verifies(root: Path) -> None:
    outcome = commit_step(root, 50)
    info = newest(root)
    assert info is not None
    assert (info.step, info.path, info.generation) == (50, outcome.path, 1)
    assert (info.world_size, info.extra, info.config_digest) == (2, {"cursor": 50}, "digest")
    assert info.num_bytes == sum((info.path / f).stat().st_size for f in FILES)
    assert verify(info.path).ok
    assert names(root) == [".fence-000000000001", "step-00000050"]


@pytest.mark.parametrize("file", [MANIFEST_NAME, *FILES])
def test_the_newest_step_that_verifies_is_used_and_the_bad_file_named(
    root: Path, file: str
) -> None:
    commit_step(root, 50)
    commit_step(root, 60)
    flip(root / "step-00000060" / file)
    reports: list[str] = []
    info = newest(root, report=reports.append)
    assert info is not None
    assert info.step == 50
    assert len(reports) == 1
    assert f"{file}:" in reports[0]
    assert not verify(root / "step-00000060").ok


def test_a_checkpoint_under_the_name_of_another_step_is_refused(root: Path) -> None:
    commit_step(root, 50)
    os.rename(root / "step-00000050", root / "step-00000070")
    assert newest(root) is None
    (listed,) = list_checkpoints(root)
    assert listed.step == 70
    assert "manifest.json: is of step 50" in str(listed.problem)


@pytest.mark.parametrize("kind", ["missing", "short", "long", "fifo", "link", "folder"])
def test_a_file_that_is_not_what_was_written_is_named(
    root: Path, kind: str, tmp_path: Path
) -> None:
    commit_step(root, 50)
    file = root / "step-00000050" / FILES[1]
    data = file.read_bytes()
    file.unlink()
    if kind == "short":
        file.write_bytes(data[:-1])
    elif kind == "long":
        file.write_bytes(data + b"\0")
    elif kind == "fifo":
        os.mkfifo(file)  # opening one for reading would wait for a writer for ever
    elif kind == "link":
        (tmp_path / "outside").write_bytes(data)  # the right bytes, in the wrong place
        file.symlink_to(tmp_path / "outside")
    elif kind == "folder":
        file.mkdir()
    verification = verify(root / "step-00000050")
    assert [f.name for f in verification.findings if f.problem] == [FILES[1]]


def test_a_step_folder_that_is_a_link_is_refused(root: Path, tmp_path: Path) -> None:
    commit_step(root, 50)
    os.rename(root / "step-00000050", tmp_path / "step-00000050")
    (root / "step-00000050").symlink_to(tmp_path / "step-00000050")
    assert newest(root) is None


def test_a_step_that_verifies_is_never_replaced(root: Path) -> None:
    commit_step(root, 50, generation=1)
    before = hashlib.sha256((root / "step-00000050" / MANIFEST_NAME).read_bytes()).hexdigest()
    CommitFence(root).advance(2)
    outcome = commit_step(root, 50, generation=2)
    after = hashlib.sha256((root / "step-00000050" / MANIFEST_NAME).read_bytes()).hexdigest()
    assert outcome.kept
    assert before == after
    assert names(root) == [".fence-000000000002", "step-00000050"]


def test_a_corrupt_step_gives_way_in_one_exchange(root: Path) -> None:
    commit_step(root, 50, generation=1)
    flip(root / "step-00000050" / FILES[0])
    CommitFence(root).advance(2)
    outcome = commit_step(root, 50, generation=2)
    assert not outcome.kept
    assert FILES[0] in outcome.note
    info = newest(root)
    assert info is not None
    assert info.generation == 2
    assert names(root) == [".fence-000000000002", "step-00000050"]


def test_the_fence_is_monotone_and_lasts(root: Path) -> None:
    CommitFence(root).advance(7)
    fence = CommitFence(root)
    assert fence.generation == 7
    fence.advance(7)
    with pytest.raises(StaleGenerationError, match=r"generation 6 .* replaced by generation 7"):
        fence.advance(6)
    with pytest.raises(StaleGenerationError), fence.guard(6):
        pytest.fail("the guard admitted a stale generation")
    with fence.guard(7), pytest.raises(WriterLockedError), fence.guard(7, timeout_s=0.02):
        pytest.fail("two at once")
    assert [n for n in names(root) if n.startswith(".fence")] == [".fence-000000000007"]


def test_a_fenced_attempt_is_void_and_its_folder_goes(root: Path) -> None:
    commit_step(root, 50)
    folder = write_attempt(root, 60, 1)
    CommitFence(root).advance(2)
    with pytest.raises(StaleGenerationError):
        commit(folder, step=60, generation=1, fence=CommitFence(root))
    assert not folder.exists()
    late = write_attempt(root, 60, 1, "a2")
    with pytest.raises(StaleGenerationError):
        commit(late, step=60, generation=1, fence=CommitFence(root))
    clean(root, generation=2)
    assert names(root) == [".fence-000000000002", "step-00000050"]


def _calls_of(action: Callable[[], object], before: Callable[[str], None]) -> object:
    """Run `action` with `before` called at every file-system call of the commit protocol."""
    wrapped = ["open", "fsync", "rename", "writev", "mkdir", "unlink", "listdir", "stat", "close"]
    originals = {name: getattr(os, name) for name in wrapped}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before(name)
            return originals[name](*args, **kwargs)

        return call

    for name in wrapped:
        setattr(os, name, wrap(name))
    try:
        return action()
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def _commit_stopping_at(root: Path, place: int) -> int:
    """Commit step 60 in a child that stops itself before call number `place`; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    num_calls = 0

    def before(_: str) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == place:
            os.kill(os.getpid(), signal.SIGSTOP)

    code = 3
    try:
        _calls_of(lambda: commit_step(root, 60, generation=1), before)
        code = 0
    except StaleGenerationError:
        code = 1
    except OSError:  # its folder went while it wrote
        code = 2
    finally:
        os._exit(code)


def test_a_stopped_writer_that_wakes_behind_the_fence_commits_nothing(tmp_path: Path) -> None:
    """Stop a real process before each of its calls in turn, advance, and wake it."""
    ended: dict[int, int] = {}
    committed_before_advance = 0
    place = 0
    while True:
        place += 1
        root = tmp_path / f"{place}"
        CommitFence(root).advance(1)
        commit_step(root, 50)
        pid = _commit_stopping_at(root, place)
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):  # the child has fewer calls than that
            break
        started_s = time.monotonic()
        CommitFence(root).advance(2, lock_timeout_s=0.05)
        assert time.monotonic() - started_s < 2, "advance waited for a stopped process"
        existed = (root / "step-00000060").exists()
        os.kill(pid, signal.SIGCONT)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 1, 2), f"place {place}: {code}"
        # What was there when advance returned may stay; nothing may come after it.
        assert (root / "step-00000060").exists() == existed, f"place {place}: a stale commit"
        assert code != 0 or existed, f"place {place}: acknowledged, and fenced"
        info = newest(root)
        assert info is not None
        assert info.step == (60 if existed else 50)
        commit_step(root, 70, generation=2)  # nothing stands in the way of the new generation
        ended[code] = ended.get(code, 0) + 1
        committed_before_advance += existed
    assert ended.get(1, 0) >= 5, f"few stale commits were tried: {ended}"
    assert committed_before_advance >= 1, "no stop lay behind the rename"


def test_every_failing_call_leaves_the_step_before_and_the_next_commit_works(
    tmp_path: Path,
) -> None:
    """Let every n-th call fail, once with no space and once with an I/O error."""
    num_failures = 0
    for number in (errno.ENOSPC, errno.EIO):
        place = 0
        while True:
            place += 1
            root = tmp_path / f"{number}-{place}"
            CommitFence(root).advance(1)
            commit_step(root, 50)
            calls: list[str] = []

            def before(name: str, place: int = place, number: int = number,
                       calls: list[str] = calls) -> None:  # fmt: skip
                calls.append(name)
                if len(calls) == place and name != "close":
                    raise OSError(number, os.strerror(number))

            try:
                _calls_of(lambda root=root: commit_step(root, 60), before)  # type: ignore[misc]
                failed = False
            except (OSError, CorruptCheckpointError):
                failed = True
            if len(calls) < place:
                break
            num_failures += failed
            info = newest(root)
            assert info is not None, f"call {place} ({calls[-1]}) lost everything"
            assert failed or info.step == 60
            commit(write_attempt(root, 70, 1, "b2"), step=70, generation=1, fence=CommitFence(root))
            info = newest(root)
            assert info is not None
            assert info.step == 70
    assert num_failures >= 20, "too few faults were injected for this to mean anything"


def test_everything_below_a_name_is_synced_before_the_name_and_the_name_after(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        trace.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        real_fsync(fd)

    def rename(old: Path, new: Path) -> None:
        trace.append(("rename", Path(new).name))
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    commit_step(root, 60)
    place = trace.index(("rename", "step-00000060"))
    before, after = trace[:place], trace[place + 1 :]
    for name in (*FILES, MANIFEST_NAME):
        assert ("fsync", name) in before
    assert before[-1] == ("fsync", ".tmp-00000060-1-a1")
    assert after[0] == ("fsync", "checkpoints")


def test_retention_keeps_the_newest_that_verify(root: Path) -> None:
    retention = Retention(root, keep=2)
    for step in (10, 20, 30, 40):
        retention.remember(commit_step(root, step).path)
    flip(root / "step-00000040" / FILES[0])
    removed = retention.prune(generation=1, fence=CommitFence(root))
    # 40 is corrupt: it neither counts nor goes, since it is newer than what is kept.
    assert [p.name for p in removed] == ["step-00000010"]
    assert names(root)[1:] == ["step-00000020", "step-00000030", "step-00000040"]


def test_retention_reads_a_checkpoint_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gangline.trainers import commit_retention

    for step in (10, 20):
        commit_step(root, step)
    verified: list[Path] = []

    def counted(path: Path) -> object:
        verified.append(path)
        return verify(path)

    monkeypatch.setattr(commit_retention, "verify", counted)
    retention = Retention(root, keep=2)
    for _ in range(3):
        assert retention.prune(generation=1, fence=CommitFence(root)) == []
    assert len(verified) == 2
    retention.remember(commit_step(root, 30).path)
    assert [p.name for p in retention.prune(generation=1, fence=CommitFence(root))] == [
        "step-00000010"
    ]
    assert len(verified) == 2


def test_a_stale_writer_removes_nothing(root: Path) -> None:
    retention = Retention(root, keep=2)
    for step in (10, 20, 30):
        commit_step(root, step)
    CommitFence(root).advance(2)
    with pytest.raises(StaleGenerationError):
        retention.prune(generation=1, fence=CommitFence(root))
    assert [i.step for i in list_checkpoints(root)] == [30, 20, 10]


def test_less_than_two_checkpoints_are_not_kept(root: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep"):
        Retention(root, keep=1)


def test_clean_leaves_what_is_not_of_a_fenced_generation(root: Path) -> None:
    for name in (".tmp-00000010-1-ab", ".tmp-00000010-2-ab", ".trash-00000010-1-ab"):
        (root / name).mkdir()
    for name in ("notes.txt", ".tmp-mine", ".tmp-00000010-0-../x".replace("/", "_")):
        (root / name).write_text("the user's own")
    removed = {p.name for p in clean(root, generation=2)}
    assert removed == {".tmp-00000010-1-ab", ".trash-00000010-1-ab"}
    assert ".tmp-00000010-2-ab" in names(root)
    assert {"notes.txt", ".tmp-mine"} <= set(names(root))


def test_a_second_writer_is_refused_with_the_holders_pid(root: Path) -> None:
    with lock_writer(root):
        with pytest.raises(WriterLockedError, match=f'"pid": {os.getpid()}'):
            lock_writer(root)
        CommitFence(root).advance(2)  # a new generation does not wait for the old writer
        lock_writer(root).release()
    lock_writer(root).release()


@pytest.fixture
def lock_holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from gangline.trainers.commit import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_lock_of_a_killed_process_is_free(
    tmp_path: Path, lock_holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(WriterLockedError, match=f'"pid": {lock_holder.pid}'):
        FolderLock(tmp_path / "lock")
    lock_holder.send_signal(signal.SIGKILL)
    lock_holder.wait()
    FolderLock(tmp_path / "lock").release()


def test_a_lock_that_was_broken_while_it_was_taken_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real_flock = tmp_path / "lock", fcntl.flock
    num_locks = 0

    def flock(fd: int, operation: int) -> None:
        nonlocal num_locks
        num_locks += 1
        if num_locks == 1:
            file.unlink()  # between the open and the lock: this inode protects nothing now
            file.touch()
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(file, timeout_s=1.0), pytest.raises(WriterLockedError):
        FolderLock(file)
    assert num_locks >= 3


def test_room_counts_what_other_ranks_have_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Status:
        f_frsize = 1
        f_bavail = 1_000_000

    monkeypatch.setattr(os, "statvfs", lambda _: Status)
    folder = root / ".tmp-00000010-1-a1"
    require_room(root, 800_000, factor=1.2, folder=folder)
    with pytest.raises(NoSpaceError, match=r"1000000 bytes free.* 900000 bytes needs 1080000"):
        require_room(root, 900_000, factor=1.2, folder=folder)
    folder.mkdir()
    (folder / "other").write_bytes(b"x" * 200_000)
    require_room(root, 900_000, factor=1.2, folder=folder)


def test_names_on_the_way_to_the_folder_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(commit_files, "fsync_folder", synced.append)
    commit_files.make_folder(tmp_path / "runs" / "a" / "checkpoints")
    assert {tmp_path, tmp_path / "runs", tmp_path / "runs" / "a"} <= set(synced)


def test_the_commit_protocol_does_not_import_torch() -> None:
    code = (
        "import sys, gangline.trainers.commit, gangline.trainers.commit_retention\n"
        "sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_manifest_is_json_for_everybody(root: Path) -> None:
    commit_step(root, 50)
    content = json.loads((root / "step-00000050" / MANIFEST_NAME).read_text())
    assert content["manifest"]["step"] == 50
    assert content["manifest"]["tensors"]["w"]["shape"] == [8, 8]
