"""Build the recorder's library at first use, with the system's C++ compiler.

    python -m gangline.comm.recorder_build [--force]      builds ahead, and says how long it took

A library serves one torch build, source, compiler, set of flags and machine type; its name is made
of them. Building happens in a folder of its own and ends in a rename, under an flock that the
kernel releases when a builder dies, so neither half a library nor a stale lock can be left behind.
A build that failed is not tried again for a day, unless forced.

Torch-free: the headers are found without importing torch.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gangline.comm.ring_folders import make_private

SOURCE = Path(__file__).with_name("recorder.cpp")
_SOURCES = (
    SOURCE,
    SOURCE.with_name("recorder_work.hpp"),
    SOURCE.with_name("recorder_ring.hpp"),
)
_COMPILERS = ("g++", "c++", "clang++")
# What torch.utils.cpp_extension passes, and -O1: it builds in two thirds of the time of -O2, and
# the recording path has no loop to optimise.
_FLAGS = (
    *("-std=c++20", "-O1", "-pipe", "-fPIC", "-shared", "-fvisibility=hidden"),
    "-D_GLIBCXX_USE_CXX11_ABI=1",
)
_BUILD_TIMEOUT_S = 600.0
_RETRY_FAILED_S = 86400.0
_NUM_LIBRARIES_KEPT = 8
_POLL_S = 0.1

Report = Callable[[str], None]


class BuildError(RuntimeError):
    """There is no library, and this says why."""


@dataclass(frozen=True)
class Built:
    """A library that is ready to be loaded."""

    library: Path
    build_s: float  # 0: it was there


@dataclass(frozen=True)
class _Torch:
    folder: Path
    version: str


def build(
    *,
    cache: Path | None = None,
    compiler: str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Built:
    """Return the library for the installed torch; build it when it is not in the cache.

    `report` gets a line before and after a build. Processes that ask at once build once.

    Raises: BuildError, also when an earlier attempt of the last day failed and `force` is not set.
    """
    torch = _find_torch()
    cache = cache or default_cache()
    path = compiler or _find_compiler()
    prefix = _digest(torch.version, platform.machine(), *_FLAGS, *(s.read_text() for s in _SOURCES))
    if path is None:
        ready = sorted(cache.glob(f"{prefix}-*.so"), key=lambda found: found.stat().st_mtime)
        if ready:
            return Built(ready[-1], 0.0)
        raise BuildError(f"there is no C++ compiler ({', '.join(_COMPILERS)}) on the PATH")
    library = cache / f"{prefix}-{_digest(_version_of(path))}.so"
    failure = library.with_suffix(".failed")
    if not force:
        ready_or_failed = _look_up(library, failure)
        if ready_or_failed is not None:
            return ready_or_failed
    with _lock(cache):
        if not force:
            ready_or_failed = _look_up(library, failure)  # another process was faster
            if ready_or_failed is not None:
                return ready_or_failed
        if report is not None:
            report(f"building the communication recorder with {path}; once for this machine")
        started_s = time.monotonic()
        try:
            _compile(path, torch, library)
        except BuildError as error:
            failure.write_text(str(error))
            raise
        failure.unlink(missing_ok=True)
        _drop_old(cache)
    build_s = time.monotonic() - started_s
    if report is not None:
        report(f"built {library} in {build_s:.1f} s")
    return Built(library, build_s)


def default_cache() -> Path:
    """Return a private folder for libraries: in the home, or in /tmp where that is read-only.

    Raises: BuildError when there is neither.
    """
    reasons = []
    for make_root in (_home_cache, _tmp_cache):
        try:
            folder = make_root() / "recorder"
            make_private(folder)  # what is loaded from here runs as this user
            if os.access(folder, os.W_OK):
                return folder
            reasons.append(f"{folder} is read-only")
        except (OSError, RuntimeError) as error:
            reasons.append(str(error))
    raise BuildError(f"there is no folder for the built library: {'; '.join(reasons)}")


def _home_cache() -> Path:
    root = Path.home() / ".cache" / "gangline"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _tmp_cache() -> Path:
    root = Path(tempfile.gettempdir()) / f"gangline-{os.getuid()}"
    make_private(root)
    return root


def _look_up(library: Path, failure: Path) -> Built | None:
    """Return the library if it is there. Raises: BuildError when building it failed lately."""
    if library.exists():
        return Built(library, 0.0)
    try:
        age_s = time.time() - failure.stat().st_mtime
        if age_s < _RETRY_FAILED_S:
            raise BuildError(
                f"{failure.read_text()} (that was {age_s / 60:.0f} min ago; "
                "`python -m gangline.comm.recorder_build --force` tries again)"
            )
    except FileNotFoundError:
        pass
    return None


def _compile(compiler: str, torch: _Torch, library: Path) -> None:
    cache = library.parent
    # We hold the lock, so whoever made the folders that are here is dead.
    for left in cache.glob("building-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as folder:
        out = Path(folder, library.name)
        include = torch.folder / "include"
        command = [compiler, *_FLAGS, str(SOURCE), "-o", str(out)]
        for path in (include, include / "torch" / "csrc" / "api" / "include"):
            command += ["-isystem", str(path)]
        command += ["-L", str(torch.folder / "lib"), "-lc10", "-ltorch_cpu"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_BUILD_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler} took longer than {_BUILD_TIMEOUT_S:.0f} s") from error
        except OSError as error:
            raise BuildError(f"{compiler} could not be started: {error}") from error
        if done.returncode != 0:
            errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
            first = (errors or done.stdout.splitlines() or ["it said nothing"])[0]
            how = f"exit code {done.returncode}" if done.returncode > 0 else "it was killed"
            raise BuildError(f"{compiler} failed ({how}): {first.strip()[:300]}")
        out.chmod(0o700)
        out.replace(library)


@contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Hold the lock of a cache. Raises: BuildError when another build takes too long."""
    fd = os.open(cache / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline_s = time.monotonic() + _BUILD_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise BuildError(
                        f"another process has held {cache / 'lock'} too long"
                    ) from None
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


def _drop_old(cache: Path) -> None:
    libraries = sorted(cache.glob("*.so"), key=lambda found: found.stat().st_mtime)
    for old in libraries[:-_NUM_LIBRARIES_KEPT]:
        old.unlink(missing_ok=True)


def _find_torch() -> _Torch:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed")
    folder = Path(spec.origin).parent
    try:
        text = (folder / "version.py").read_text()
    except OSError as error:
        raise BuildError(f"torch's version cannot be read: {error}") from error
    words = re.findall(r"^(?:__version__|git_version) = '([^']+)'", text, re.MULTILINE)
    return _Torch(folder, " ".join(words))


def _find_compiler() -> str | None:
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


@functools.cache
def _version_of(compiler: str) -> str:
    try:
        done = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} does not run: {error}") from error
    return f"{os.path.realpath(compiler)} {done.stdout.splitlines()[0]}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def main() -> int:
    """Build ahead; return the exit code."""
    try:
        built = build(force="--force" in sys.argv[1:], report=lambda line: print(line, flush=True))
    except BuildError as error:
        print(f"no communication recorder in C++: {error}", file=sys.stderr)
        return 1
    if not built.build_s:
        print(f"{built.library} is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
