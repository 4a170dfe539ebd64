"""Find and verify committed checkpoints; torch-free, and read-only.

There is no pointer to the newest checkpoint that could be wrong: `newest` looks at what is there
and verifies it, from the highest step down.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gangline.trainers.commit_files import (
    CorruptCheckpointError,
    check_file,
    opened_folder,
    read_capped,
)
from gangline.trainers.commit_layout import file_layouts
from gangline.trainers.commit_manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Manifest,
    decode,
)

_STEP_NAME = re.compile(r"step-(\d{8,18})", re.ASCII)


@dataclass(frozen=True)
class CheckpointInfo:
    """Identify one committed checkpoint."""

    step: int
    path: Path
    generation: int
    world_size: int
    num_bytes: int  # data files, without the manifest
    extra: dict[str, Any]
    config_digest: str
    manifest_sha256: str = ""
    problem: str | None = (
        None  # why it cannot be used, naming the file; None where nothing is known
    )


@dataclass(frozen=True)
class FileFinding:
    """Report on one file of a checkpoint."""

    name: str
    num_bytes: int
    problem: str | None  # None: it is what the manifest says


@dataclass(frozen=True)
class Verification:
    """Report on one checkpoint, file by file; the manifest comes first."""

    path: Path
    info: CheckpointInfo | None  # None where the manifest itself cannot be believed
    findings: tuple[FileFinding, ...]
    unlisted: tuple[str, ...] = field(default=())  # names nobody vouches for; never read

    @property
    def ok(self) -> bool:
        """Tell whether every byte that a load would use is what was committed."""
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """Name the first bad file and its reason."""
        bad = (f"{f.name}: {f.problem}" for f in self.findings if f.problem is not None)
        return next(bad, None)


def step_name(step: int) -> str:
    """Name the folder of a committed step; the only way in which such a name is made."""
    return f"step-{step:08d}"


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """List the folders that have the name of a committed step, newest first, unverified."""
    if not root.is_dir():
        return []
    found = []
    for entry in root.iterdir():
        match = _STEP_NAME.fullmatch(entry.name)
        if match and entry.name == step_name(int(match[1])):
            found.append((int(match[1]), entry))
    return sorted(found, reverse=True)


def read_manifest(path: Path) -> tuple[Manifest, CheckpointInfo]:
    """Read and check the manifest of the checkpoint at `path`, not its data files.

    Raises: CorruptCheckpointError, also where the folder's name belongs to another step.
    """
    with opened_folder(path) as folder_fd:
        data = read_capped(path, folder_fd, MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    manifest = decode(data, path / MANIFEST_NAME)
    if _STEP_NAME.fullmatch(path.name) and path.name != step_name(manifest.step):
        reason = f"is of step {manifest.step}, which is not the step of its folder"
        raise CorruptCheckpointError(path / MANIFEST_NAME, reason)
    info = CheckpointInfo(
        step=manifest.step,
        path=path,
        generation=manifest.generation,
        world_size=manifest.world_size,
        num_bytes=sum(record.num_bytes for record in manifest.files.values()),
        extra=manifest.extra,
        config_digest=manifest.config_digest,
        manifest_sha256=hashlib.sha256(data).hexdigest(),
    )
    return manifest, info


def verify(path: Path) -> Verification:
    """Check every byte of the checkpoint at `path` and report file by file; raises nothing."""
    path = Path(path)
    try:
        manifest, info = read_manifest(path)
    except CorruptCheckpointError as error:
        return Verification(path, None, (FileFinding(error.file.name, 0, error.reason),))
    findings = [FileFinding(MANIFEST_NAME, 0, None)]
    layouts = file_layouts(manifest.tensors)
    try:
        with opened_folder(path) as folder_fd:
            for name, record in manifest.files.items():
                problem = None
                try:
                    check_file(path, folder_fd, name, record, header=layouts[name].header)
                except CorruptCheckpointError as error:
                    problem = error.reason
                findings.append(FileFinding(name, record.num_bytes, problem))
        unlisted = sorted({p.name for p in path.iterdir()} - {MANIFEST_NAME} - set(manifest.files))
    except (CorruptCheckpointError, OSError) as error:
        return Verification(path, info, (*findings, FileFinding(path.name, 0, str(error))))
    return Verification(path, info, tuple(findings), tuple(unlisted))


def newest(root: Path, *, report: Callable[[str], None] | None = None) -> CheckpointInfo | None:
    """Find the newest committed checkpoint that verifies; `report` gets one line per bad one.

    Every byte of the answer has been read and hashed. None where no step verifies.
    """
    for _, path in step_folders(Path(root)):
        verification = verify(path)
        if verification.ok:
            return verification.info
        # A step that retention removed meanwhile is not a corrupt one.
        if report is not None and path.exists():
            report(f"{path} is not usable: {verification.problem}")
    return None


def list_checkpoints(root: Path) -> list[CheckpointInfo]:
    """List the committed checkpoints, newest first, from their manifests alone.

    The data files are not read (see `verify`). A checkpoint whose manifest cannot be believed is
    listed with its `problem`, with zeros for what is not known.
    """
    found = []
    for step, path in step_folders(Path(root)):
        try:
            found.append(read_manifest(path)[1])
        except CorruptCheckpointError as error:
            if path.exists():
                problem = f"{error.file.name}: {error.reason}"
                found.append(CheckpointInfo(step, path, 0, 0, 0, {}, "", problem=problem))
    return found
