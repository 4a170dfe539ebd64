"""Run ids, run folders, and what a user may call a job.

A run id is `<name>-<6 base32 characters>`. Its folder `<root>/<run_id>` is all that a run ever
writes into, so the folder is made once, by this file, and checked to lie where it seems to lie.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from gangline.orchestrator.errors import GanglineError, NotFoundError, UsageError

RUN_ID_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SUFFIX_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_SUFFIX_LENGTH = 6
MAX_NAME_LENGTH = 54
NAME_PATTERN = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{MAX_NAME_LENGTH - 1}}}")
LAST = "@last"
_MAX_CANDIDATES = 5


class Named(Protocol):
    """What `resolve` looks at."""

    @property
    def run_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def created_at(self) -> float: ...


JobT = TypeVar("JobT", bound=Named)


def new_run_id(name: str) -> str:
    """Return a fresh run id for a job of this name.

    Raises: UsageError when the name could not be part of a folder's name on every system.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"name {name!r} is not a job name: it must match {NAME_PATTERN.pattern} (lower-case "
            f"letters, digits, '.', '_', '-', at most {MAX_NAME_LENGTH}); change `name` in the job "
            "file or pass --name"
        )
    return f"{name}-" + "".join(secrets.choice(_SUFFIX_ALPHABET) for _ in range(_SUFFIX_LENGTH))


def create_run_folder(root: Path, run_id: str) -> Path:
    """Make `<root>/<run_id>` with its `logs` and `control` folders and return its real path.

    Guarantees: the folder did not exist before, is no link, and lies in `root`.
    Raises: GanglineError where that cannot be had.
    """
    _check_run_id(run_id)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = root.resolve(strict=True) / run_id
        # mkdir follows no link in its last part and fails when anything is there already.
        folder.mkdir()
        (folder / "logs").mkdir()
        (folder / "control").mkdir()
    except FileExistsError as error:
        raise GanglineError(
            f"{error.filename} exists already; a new run needs a folder of its own: run again for "
            "another run id, or choose another place with --runs"
        ) from error
    except OSError as error:
        raise GanglineError(
            f"cannot make the run folder {root / run_id}: {error.strerror}; choose another place "
            "with --runs"
        ) from error
    return folder


def open_run_folder(root: Path, run_id: str) -> Path:
    """Return the real path of an existing run folder.

    Raises: NotFoundError when there is none; GanglineError when it is a link out of `root`.
    """
    _check_run_id(run_id)
    folder = root / run_id
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is not there: the folder of {run_id} was moved or deleted")
    real_root = root.resolve()
    if folder.resolve() != real_root / run_id:
        raise GanglineError(
            f"{folder} is a link to {folder.resolve()}, outside {real_root}; nothing is written "
            "there: put the folder itself in its place"
        )
    return real_root / run_id


def _check_run_id(run_id: str) -> None:
    if not RUN_ID_PATTERN.fullmatch(run_id):
        raise UsageError(f"{run_id!r} is not a run id: it must match {RUN_ID_PATTERN.pattern}")


def request_cancel(run_dir: Path, *, force: bool) -> None:
    """Ask the driver of a run, which may be another process, to cancel it.

    The file appears whole: the driver acts on its being there, and on the word in it.
    """
    folder = run_dir / "control"
    folder.mkdir(exist_ok=True)
    draft = folder / f".cancel.{os.getpid()}"
    draft.write_text("force\n" if force else "cancel\n")
    draft.replace(folder / "cancel")


def resolve(reference: str, jobs: Sequence[JobT]) -> JobT:
    """Return the job that `reference` names.

    In this order: `@last` is the newest; a whole run id; a name, which is the newest run of that
    name; a beginning of exactly one run id.

    Raises: NotFoundError with the nearest run ids when none or several fit.
    """
    newest_first = sorted(jobs, key=lambda job: job.created_at, reverse=True)
    if reference == LAST:
        if newest_first:
            return newest_first[0]
        raise NotFoundError("@last: there is no job yet; start one with `gangline run FILE`")
    fits: tuple[Callable[[JobT], bool], ...] = (
        lambda job: job.run_id == reference,
        lambda job: job.name == reference,
    )
    for fit in fits:
        found = next((job for job in newest_first if fit(job)), None)
        if found is not None:
            return found
    found_ids = [job for job in newest_first if reference and job.run_id.startswith(reference)]
    if len(found_ids) == 1:
        return found_ids[0]
    if found_ids:
        candidates = tuple(job.run_id for job in found_ids[:_MAX_CANDIDATES])
        raise NotFoundError(
            f"{reference!r} is the beginning of {len(found_ids)} run ids: "
            f"{_listed(candidates, len(found_ids))}; give more of it",
            candidates,
        )
    candidates = _nearest(reference, newest_first)
    hint = f"did you mean {_listed(candidates, len(candidates))}?" if candidates else ""
    raise NotFoundError(f"no job {reference!r}; {hint or 'see `gangline ls --all`'}", candidates)


def _nearest(reference: str, newest_first: Sequence[Named]) -> tuple[str, ...]:
    import difflib

    words = [job.run_id for job in newest_first] + [job.name for job in newest_first]
    close = difflib.get_close_matches(reference, words, n=_MAX_CANDIDATES, cutoff=0.5)
    return tuple(dict.fromkeys(close))


def _listed(candidates: tuple[str, ...], num_all: int) -> str:
    more = f", ... ({num_all - len(candidates)} more)" if num_all > len(candidates) else ""
    return ", ".join(candidates) + more
