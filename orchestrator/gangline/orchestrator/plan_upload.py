"""Find the files that travel with a submitted script.

In a git work tree these are the tracked files and the untracked ones that git does not ignore;
elsewhere all files but caches and environments. Nothing is left out in silence: what does not
travel is in the notes. Only names and sizes are read.
"""

import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

WARN_ABOVE_BYTES = 100 * 2**20
NUM_MAX_FILES = 100_000

# What `submit` itself writes beside the files.
RESERVED_NAMES = frozenset(["job.json", "env.json"])

_GIT_TIMEOUT_S = 30.0
_SKIPPED_FOLDERS = frozenset(
    [".git", ".hg", ".svn", ".venv", "venv", "__pycache__", ".mypy_cache", ".pytest_cache",
     ".ruff_cache", ".ipynb_checkpoints", "node_modules"]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class UploadFile:
    """One file that travels: its path in the archive, where it is here, its size."""

    name: str
    source: Path
    num_bytes: int


@dataclass
class Upload:
    """What travels with a job. `how` says how the files were chosen, `notes` what to know.

    `is_cut_off` if there are more than `NUM_MAX_FILES`; the last note says so.
    """

    folder: Path
    how: str
    files: list[UploadFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_cut_off: bool = False

    @property
    def num_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(file.num_bytes for file in self.files)


def find_upload(folder: Path, *, skip: Iterable[Path] = ()) -> Upload:
    """List what would travel of a folder; `skip` are folders of our own output inside it."""
    skipped = {path.resolve() for path in skip}
    tracked = _git_files(folder)
    names: Iterable[str]
    if tracked is None:
        upload = Upload(folder, "all but caches and environments, for it is no git work tree")
        names = _walk(folder, upload)
    else:
        upload = Upload(folder, "what git tracks, and what is untracked but not ignored")
        names = tracked
    root = folder.resolve()
    for name in sorted(names):
        if len(upload.files) >= NUM_MAX_FILES:
            upload.is_cut_off = True
            break
        _add(upload, root, name, skipped)
    for path in skipped:
        if path != root and path.is_relative_to(root) and path.exists():
            upload.notes.append(f"{str(path.relative_to(root))!r} does not travel: it holds runs")
    if upload.num_bytes > WARN_ABOVE_BYTES:
        largest = max(upload.files, key=lambda file: file.num_bytes)
        upload.notes.append(
            f"working_dir is {upload.num_bytes / 2**20:.0f} MiB, the largest file {largest.name!r} "
            f"{largest.num_bytes / 2**20:.0f} MiB; add what the script does not need to .gitignore"
        )
    if upload.is_cut_off:
        upload.notes.append(
            f"working_dir has more than {NUM_MAX_FILES} files; set working_dir to a folder that "
            "holds only what the script needs"
        )
    return upload


def _add(upload: Upload, root: Path, name: str, skipped: set[Path]) -> None:
    source = upload.folder / name
    try:
        real = source.resolve()
        if not real.is_relative_to(root):
            upload.notes.append(f"{name!r} does not travel: it is a link out of working_dir")
        elif any(real.is_relative_to(path) for path in skipped if path != root):
            pass  # said once, for the whole folder
        elif real.is_dir():
            kind = "a link to a folder" if source.is_symlink() else "a git submodule"
            upload.notes.append(f"{name!r} does not travel: it is {kind}")
        elif real.is_file():
            upload.files.append(UploadFile(name, source, real.stat().st_size))
        elif source.is_symlink():
            upload.notes.append(f"{name!r} does not travel: it is a broken link")
        elif real.exists():
            upload.notes.append(f"{name!r} does not travel: it is no ordinary file")
        # Else git tracks it, but it was deleted.
    except (OSError, RuntimeError) as error:
        upload.notes.append(f"{name!r} does not travel: {error.__class__.__name__}")


def _git_files(folder: Path) -> list[str] | None:
    """Ask git for the files of a folder; None where git has nothing to say."""
    # A configured fsmonitor is a program that git would start for whoever owns the work tree.
    command = ["git", "-c", "core.fsmonitor=false", "ls-files", "-z", "--cached", "--others"]
    try:
        done = subprocess.run(
            [*command, "--exclude-standard"],
            cwd=folder,
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    names = done.stdout.decode("utf-8", "surrogateescape").split("\0")
    return list(dict.fromkeys(name for name in names if name))


def _walk(folder: Path, upload: Upload) -> Iterator[str]:
    left_out: list[str] = []
    num_files = 0
    for place, folders, files in os.walk(folder):
        here = Path(place)
        kept = []
        for name in sorted(folders):
            if name in _SKIPPED_FOLDERS:
                left_out.append(str((here / name).relative_to(folder)))
            elif (here / name).is_symlink():
                yield str((here / name).relative_to(folder))
            else:
                kept.append(name)
        folders[:] = kept
        for name in files:
            yield str((here / name).relative_to(folder))
            num_files += 1
        if num_files > NUM_MAX_FILES:
            break
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        upload.notes.append(f"left out: {', '.join(left_out[:3])}{more}")
