"""Small file systems for fault tests, in a mount namespace of their own.

What is mounted here nobody else sees, and it goes with the process, even with a killed one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gangline.orchestrator.bench_checkpoint_subjects import end_child, fork_child

_CLONE_NEWNS = 0x00020000


def in_private_mounts(body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run `body` in a child with private mounts and return its JSON value.

    Raises: RuntimeError with the child's traceback.
    """
    read_end, write_end = os.pipe()
    pid = fork_child()
    if pid == 0:
        answer: dict[str, Any]
        try:
            _unshare()
            answer = {"value": body()}
        except BaseException:  # noqa: BLE001 - told to the parent, which raises
            answer = {"error": traceback.format_exc()}
        with os.fdopen(write_end, "w") as out:
            json.dump(answer, out)
        end_child(0)
    os.close(write_end)
    with os.fdopen(read_end) as told:
        text = told.read()
    os.waitpid(pid, 0)
    answer = json.loads(text or '{"error": "the child said nothing"}')
    if "error" in answer:
        raise RuntimeError(answer["error"])
    value: dict[str, Any] = answer["value"]
    return value


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare of the mount namespace")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def missing(*, loop: bool) -> str | None:
    """Say why file systems cannot be mounted here; None where they can."""
    if os.geteuid() != 0:
        return "mounting needs root; run the bench as root"

    def try_it() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if loop:
                make_image(folder / "image", size_bytes=8 << 20)
                with mounted(folder / "image", folder / "mnt"):
                    (folder / "mnt" / "file").write_text("x")
            else:
                with mounted_tmpfs(folder / "mnt", size_bytes=1 << 20):
                    (folder / "mnt" / "file").write_text("x")
        return {}

    try:
        in_private_mounts(try_it)
    except RuntimeError as error:
        what = "ext4 on a loop device" if loop else "a tmpfs"
        return f"{what} cannot be mounted here: {str(error).strip().splitlines()[-1]}"
    return None


def make_image(image: Path, *, size_bytes: int) -> None:
    """Make an ext4 file system in a file."""
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[None]:
    """Mount an image; an unclean one gets its journal replayed."""
    with _mounted(["-o", "loop", str(image), str(folder)], folder):
        yield


@contextlib.contextmanager
def mounted_tmpfs(folder: Path, *, size_bytes: int) -> Iterator[None]:
    """Mount a file system in memory that is full after `size_bytes`."""
    with _mounted(["-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], folder):
        yield


@contextlib.contextmanager
def _mounted(arguments: list[str], folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
