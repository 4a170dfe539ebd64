"""Damage on the disk: bit flips, cut files, lost files. All of it must be seen, and named.

The checkpoint lies in memory (tmpfs), so that ten thousand damages take seconds. Half of the flips
choose the file first and then the place, so that small files, the manifest above all, get as many
as large ones; the other half fall anywhere in the bytes.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gangline.orchestrator.bench_checkpoint_kill import Tally
from gangline.orchestrator.bench_checkpoint_subjects import Ours, Stock, Subject, fresh
from gangline.trainers.commit import verify

_ELEMENTS = 1 << 11  # of each tensor: 32 KiB in all
_FULL_LOAD_EVERY = 50  # damages; in between only the verification is run


def damaged_subjects() -> list[Subject]:
    """List the subjects; ours in four data files, so that files can be confused."""
    return [
        Ours(num_elements=_ELEMENTS, max_file_bytes=4 * _ELEMENTS),
        Stock(per_step=True, num_elements=_ELEMENTS),
    ]


def run_damage(subject: Subject, work: Path, *, seed: int, num_flips: int, first: int = 0) -> Tally:
    """Flip bits one at a time, and cut, drop, lengthen, blank, swap and age files."""
    tally = Tally()
    started_s = time.monotonic()
    root = fresh(work / "damage")
    session = subject.start(root, 1)
    for step in (1, 2):
        session.save(step)
    session.close()
    tally.num_acknowledged = 2
    newest = subject.folder(root)
    files = sorted(p for p in newest.iterdir() if p.is_file())
    examine = _verified if isinstance(subject, Ours) else _loaded
    by_file: Counter[str] = Counter()
    for number in range(first, first + num_flips):
        rng = random.Random(f"{seed}-{number}")  # noqa: S311 - a replayable draw, not a secret
        file = _draw(rng, files)
        place, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        full = number % _FULL_LOAD_EVERY == 0
        with _flipped(file, place, bit):
            outcome, why = examine(subject, root, file, full)
        by_file[file.name] += 1
        tally.num_faults += 1
        again = f"--only damage --seed {seed} --first {number} --flips 1"
        tally.add(
            outcome,
            f"{file.name}, byte {place}, bit {bit}: {why}; "
            f"again: python -m gangline.orchestrator.bench_checkpoint {again}",
        )
    tally.more["flips_by_file"] = dict(by_file)
    _other_damage(subject, root, files, examine, seed, max(1, num_flips // 100), tally)
    tally.seconds = time.monotonic() - started_s
    shutil.rmtree(root)
    return tally


def _draw(rng: random.Random, files: list[Path]) -> Path:
    if rng.random() < 0.5:
        return rng.choice(files)
    return rng.choices(files, weights=[f.stat().st_size for f in files])[0]


@contextmanager
def _flipped(file: Path, place: int, bit: int) -> Iterator[None]:
    fd = os.open(file, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, place)
        os.pwrite(fd, bytes([byte[0] ^ (1 << bit)]), place)
        yield
        os.pwrite(fd, byte, place)
    finally:
        os.close(fd)


Examine = Callable[[Subject, Path, Path, bool], tuple[str, str]]


def _verified(subject: Subject, root: Path, file: Path, full: bool) -> tuple[str, str]:
    problem = verify(file.parent).problem
    if problem is None:
        return "not seen", "the damaged checkpoint verifies"
    if not problem.startswith(f"{file.name}:"):
        return "wrong file named", problem
    if full and (found := subject.find(root)).step != 1:
        return "no way back", f"the step before was not used: {found}"
    return "ok", ""


def _loaded(subject: Subject, root: Path, file: Path, full: bool) -> tuple[str, str]:
    found = subject.find(root)
    if found.step is None:
        return "ok", ""  # it raised, which is all that can be asked of it
    if found.problem or found.step != 2:
        return "loaded wrong", found.problem or f"as step {found.step}"
    return "no effect", "the values are right all the same"


def _other_damage(
    subject: Subject,
    root: Path,
    files: list[Path],
    examine: Examine,
    seed: int,
    num_rounds: int,
    tally: Tally,
) -> None:
    kinds: Counter[str] = Counter()
    for number in range(num_rounds):
        rng = random.Random(f"{seed}-other-{number}")  # noqa: S311 - as above
        for kind, damage in _DAMAGES.items():
            file = rng.choice(files)
            before = {f: f.read_bytes() for f in files}
            if not damage(rng, file, files):
                continue
            outcome, why = examine(subject, root, file, True)
            for f, data in before.items():
                f.write_bytes(data)
            kinds[kind] += 1
            tally.num_faults += 1
            tally.add(outcome, f"{kind} of {file.name}, seed {seed}, round {number}: {why}")
    tally.more["other_damage"] = dict(kinds)


def _cut(rng: random.Random, file: Path, files: list[Path]) -> bool:
    os.truncate(file, rng.randrange(file.stat().st_size))
    return True


def _drop(rng: random.Random, file: Path, files: list[Path]) -> bool:
    file.unlink()
    return True


def _lengthen(rng: random.Random, file: Path, files: list[Path]) -> bool:
    with open(file, "ab") as out:
        out.write(rng.randbytes(rng.randint(1, 4096)))
    return True


def _blank(rng: random.Random, file: Path, files: list[Path]) -> bool:
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    stop = min(len(data), start + 4096)
    is_blank = not any(data[start:stop])
    data[start:stop] = bytes(stop - start)
    file.write_bytes(data)
    return not is_blank


def _swap(rng: random.Random, file: Path, files: list[Path]) -> bool:
    others = [f for f in files if f.read_bytes() != file.read_bytes()]
    if not others:
        return False
    file.write_bytes(rng.choice(others).read_bytes())
    return True


def _age(rng: random.Random, file: Path, files: list[Path]) -> bool:
    older = file.parent.with_name("step-00000001") / file.name
    if not older.exists():
        return False
    file.write_bytes(older.read_bytes())
    return True


_DAMAGES: dict[str, Callable[[random.Random, Path, list[Path]], bool]] = {
    "cut": _cut,
    "loss": _drop,
    "growth": _lengthen,
    "blank page": _blank,
    "swap with another file": _swap,
    "swap with the same file of the step before": _age,
}
