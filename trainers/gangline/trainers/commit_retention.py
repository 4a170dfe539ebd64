"""Remove what is no longer needed: old checkpoints, and what dead attempts left behind.

A name goes before its content does: a folder is renamed to trash first, so that there is never a
step with some of its files gone.
"""

from __future__ import annotations

import os
from pathlib import Path

from gangline.trainers.commit import CommitFence, attempts, discard, to_trash
from gangline.trainers.commit_verify import step_folders, verify


def clean(root: Path, *, generation: int) -> list[Path]:
    """Remove the attempts of fenced generations, and trash; called by the writer of `generation`.

    Attempts of `generation` itself, of newer ones, and names that are not ours stay.
    """
    removed = []
    for path, kind, owner in attempts(root):
        if owner < generation or (kind == "trash" and owner == generation):
            discard(path)
            removed.append(path)
    return removed


class Retention:
    """Keep the `keep` newest checkpoints that verify; remove what is older than those.

    A checkpoint that this process committed was hashed as it was written, and one that it has
    verified stays verified while its files have the same inode, size and time. So a save reads
    no older data, only their names.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        if keep < 2:
            raise ValueError(f"keep {keep} is below 2; set checkpoint.keep to 2 or more")
        self._root = root
        self._keep = keep
        self._known: dict[Path, tuple[object, bool]] = {}

    def remember(self, path: Path) -> None:
        """Take `path` as verified: this process has just committed it."""
        self._known[path] = (_signature(path), True)

    def prune(self, *, generation: int, fence: CommitFence) -> list[Path]:
        """Remove the checkpoints older than the `keep` newest verified ones.

        Raises: StaleGenerationError; OSError. Guarantees: removes nothing before `keep` newer
        checkpoints verify; a name that goes is renamed first, so that no torn step is left.
        """
        steps = step_folders(self._root)
        num_verified, victims = 0, []
        for place, (_, path) in enumerate(steps):
            num_verified += self._verifies(path)
            if num_verified == self._keep:
                victims = steps[place + 1 :]
                break
        if not victims:
            return []
        with fence.guard(generation):
            trash = [to_trash(path, f"{step:08d}", generation) for step, path in victims]
        for folder in trash:
            discard(folder)
        for _, path in victims:
            self._known.pop(path, None)
        return [path for _, path in victims]

    def _verifies(self, path: Path) -> bool:
        signature = _signature(path)
        known = self._known.get(path)
        if known is None or known[0] != signature:
            known = (signature, verify(path).ok)
            self._known[path] = known
        return known[1]


def _signature(path: Path) -> object:
    try:
        stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(path)]
    except OSError as error:
        return str(error)
    return sorted((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats)
