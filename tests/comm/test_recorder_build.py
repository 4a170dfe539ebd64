"""Building the recorder: once, whole or not at all, and with a reason when it cannot be."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from gangline.comm import recorder_build
from gangline.comm.recorder_build import BuildError, build

BUILD = """
import sys
from pathlib import Path
from gangline.comm.recorder_build import build
print("building", flush=True)
print(build(cache=Path(sys.argv[1]), compiler=sys.argv[2]).library)
"""


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def fake_compiler(tmp_path, body):
    """A compiler that notes each call in `calls` and then does `body`, which is to make $out."""
    path = tmp_path / "compiler"
    path.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "fake 1.0" && exit\n'
        f"echo called >> {tmp_path}/calls\n"
        'while [ "$1" != -o ]; do shift; done; out=$2\n' + body
    )
    path.chmod(0o755)
    return str(path)


def num_calls(tmp_path):
    calls = tmp_path / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def start_build(cache, compiler):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, cache, compiler], stdout=subprocess.PIPE, text=True
    )


def test_a_library_is_built_once(tmp_path, cache):
    compiler = fake_compiler(tmp_path, 'echo library > "$out"')
    said: list[str] = []
    built = build(cache=cache, compiler=compiler, report=said.append)
    assert built.library.read_text() == "library\n"
    assert built.build_s > 0
    assert [line.split()[0] for line in said] == ["building", "built"]
    assert f"in {built.build_s:.1f} s" in said[1]
    again = build(cache=cache, compiler=compiler, report=said.append)
    assert (again.library, again.build_s, len(said)) == (built.library, 0.0, 2)
    assert num_calls(tmp_path) == 1
    assert sorted(path.name for path in cache.iterdir()) == [built.library.name, "lock"]
    assert stat.S_IMODE(built.library.stat().st_mode) == 0o700


def test_processes_that_ask_at_once_build_once(tmp_path, cache):
    compiler = fake_compiler(tmp_path, 'sleep 0.5; echo library > "$out"')
    builders = [start_build(cache, compiler) for _ in range(3)]
    outputs = {builder.communicate(timeout=60)[0] for builder in builders}
    assert len(outputs) == 1
    assert num_calls(tmp_path) == 1


def test_another_compiler_source_or_torch_is_another_library(tmp_path, cache, monkeypatch):
    compiler = fake_compiler(tmp_path, 'echo library > "$out"')
    names = {build(cache=cache, compiler=compiler).library.name}
    source = tmp_path / "source.cpp"
    source.write_text("int main() {}")
    with monkeypatch.context() as patch:
        patch.setattr(recorder_build, "_SOURCES", (source,))
        names.add(build(cache=cache, compiler=compiler).library.name)
    with monkeypatch.context() as patch:
        torch = recorder_build._Torch(tmp_path, "2.99 abc")
        patch.setattr(recorder_build, "_find_torch", lambda: torch)
        names.add(build(cache=cache, compiler=compiler).library.name)
    with monkeypatch.context() as patch:
        patch.setattr(recorder_build, "_version_of", lambda compiler: "fake 2.0")
        names.add(build(cache=cache, compiler=compiler).library.name)
    assert len(names) == 4
    assert "cf30153" not in recorder_build._find_torch().version.partition(" ")[0]
    assert recorder_build._find_torch().version.startswith("2.")


def test_a_killed_builder_leaves_no_lock_and_no_folder(tmp_path, cache):
    slow = fake_compiler(tmp_path, f'echo $$ > {tmp_path}/pid; echo half > "$out"; exec sleep 60')
    builder = start_build(cache, slow)
    try:
        deadline = time.monotonic() + 60
        while not list(cache.glob("building-*/*.so")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(builder.pid, signal.SIGKILL)
        builder.wait()
        assert len(list(cache.glob("building-*"))) == 1
        quick = fake_compiler(tmp_path, 'echo library > "$out"')
        started_s = time.monotonic()
        built = build(cache=cache, compiler=quick)
        assert time.monotonic() - started_s < 10
        assert built.library.read_text() == "library\n"
        assert sorted(path.name for path in cache.iterdir()) == [built.library.name, "lock"]
    finally:
        builder.kill()
        builder.communicate()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # its orphan


def test_a_build_that_failed_says_why_and_is_not_tried_at_each_start(tmp_path, cache):
    compiler = fake_compiler(
        tmp_path, 'echo "note: hm"; echo "x.cpp:1:1: error: no such thing" >&2; exit 1'
    )
    with pytest.raises(BuildError, match=r"exit code 1.*x.cpp:1:1: error: no such thing$"):
        build(cache=cache, compiler=compiler)
    with pytest.raises(BuildError, match=r"no such thing.*--force"):
        build(cache=cache, compiler=compiler)
    assert num_calls(tmp_path) == 1
    with pytest.raises(BuildError):
        build(cache=cache, compiler=compiler, force=True)
    assert num_calls(tmp_path) == 2
    (failure,) = cache.glob("*.failed")
    os.utime(failure, (1, 1))
    compiler = fake_compiler(tmp_path, 'echo library > "$out"')
    assert build(cache=cache, compiler=compiler).library.exists()
    assert not failure.exists()


def test_a_compiler_that_is_killed_or_hangs_is_an_error(tmp_path, cache, monkeypatch):
    with pytest.raises(BuildError, match="it was killed"):
        build(cache=cache, compiler=fake_compiler(tmp_path, "kill -9 $$"))
    monkeypatch.setattr(recorder_build, "_BUILD_TIMEOUT_S", 0.3)
    with pytest.raises(BuildError, match="took longer than"):
        build(cache=cache, compiler=fake_compiler(tmp_path, "exec sleep 30"), force=True)
    assert list(cache.glob("building-*")) == []


def test_without_a_compiler_there_is_a_reason_or_what_was_built_before(
    tmp_path, cache, monkeypatch
):
    compiler = fake_compiler(tmp_path, 'echo library > "$out"')
    monkeypatch.setattr(recorder_build, "_COMPILERS", ("gangline-has-no-such-compiler",))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        build(cache=cache)
    built = build(cache=cache, compiler=compiler)
    assert build(cache=cache) == recorder_build.Built(built.library, 0.0)
    with pytest.raises(BuildError, match="does not run"):
        build(cache=cache, compiler=str(tmp_path / "none"))


def test_a_cache_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    cache = recorder_build.default_cache()
    assert cache == home / ".cache" / "gangline" / "recorder"
    cache.chmod(0o777)
    assert recorder_build.default_cache().parent.parent == tmp_path / "tmp"
    (recorder_build.default_cache()).chmod(0o777)
    with pytest.raises(BuildError, match="only this user"):
        recorder_build.default_cache()


def test_a_build_waits_for_another_but_not_for_ever(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(recorder_build, "_BUILD_TIMEOUT_S", 1.0)
    compiler = fake_compiler(tmp_path, 'echo library > "$out"')
    with recorder_build._lock(cache), pytest.raises(BuildError, match="has held"):
        build(cache=cache, compiler=compiler)
    assert build(cache=cache, compiler=compiler).build_s > 0


@pytest.mark.ranks
def test_the_command_builds_ahead():
    if recorder_build._find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    command = [sys.executable, "-m", "gangline.comm.recorder_build"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "up to date" in first.stdout or "built" in first.stdout
    assert again.stdout.endswith(".so is up to date\n")
