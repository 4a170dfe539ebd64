"""Run ids, run folders, and the names by which a user may call a job."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.orchestrator import runs
from gangline.orchestrator.errors import GanglineError, NotFoundError, UsageError


@dataclass(frozen=True)
class Named:
    run_id: str
    name: str
    created_at: float


JOBS = [
    Named("moe-aaaaaa", "moe", 1.0),
    Named("moe-bbbbbb", "moe", 3.0),
    Named("moe-text-cccccc", "moe-text", 2.0),
    Named("dense-dddddd", "dense", 0.0),
]


@given(st.from_regex(runs.NAME_PATTERN, fullmatch=True))
def test_a_run_id_begins_with_the_name_and_is_a_safe_folder_name(name: str) -> None:
    run_id = runs.new_run_id(name)
    assert run_id.startswith(f"{name}-")
    assert runs.RUN_ID_PATTERN.fullmatch(run_id)
    assert Path(run_id).name == run_id


def test_run_ids_of_one_name_differ() -> None:
    assert len({runs.new_run_id("moe") for _ in range(200)}) == 200


@pytest.mark.parametrize("name", ["", "Moe", "-moe", "../x", "a/b", "a b", "moe\n", "x" * 55, "ä"])
def test_a_bad_name_is_refused_with_the_pattern(name: str) -> None:
    with pytest.raises(UsageError, match="must match"):
        runs.new_run_id(name)


def test_the_longest_name_here_is_the_longest_in_a_job_file() -> None:
    from gangline.orchestrator.job_models import NAME_PATTERN

    assert NAME_PATTERN.strip("^$") == runs.NAME_PATTERN.pattern


def test_a_run_folder_is_made_once(tmp_path: Path) -> None:
    folder = runs.create_run_folder(tmp_path / "runs", "moe-aaaaaa")
    assert (folder / "logs").is_dir()
    assert (folder / "control").is_dir()
    with pytest.raises(GanglineError, match="exists already"):
        runs.create_run_folder(tmp_path / "runs", "moe-aaaaaa")


@pytest.mark.parametrize("run_id", ["..", ".", "a/../../b", "/etc", "", "a\0b"])
def test_nothing_is_made_outside_the_root(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(UsageError):
        runs.create_run_folder(tmp_path / "runs", run_id)
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_a_run_folder_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "runs"
    root.mkdir()
    (root / "moe-aaaaaa").symlink_to(outside)
    with pytest.raises(GanglineError):
        runs.create_run_folder(root, "moe-aaaaaa")
    with pytest.raises(GanglineError, match="is a link"):
        runs.open_run_folder(root, "moe-aaaaaa")
    assert not list(outside.iterdir())


def test_a_linked_root_is_resolved_before_anything_is_made(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "runs").symlink_to(real)
    folder = runs.create_run_folder(tmp_path / "runs", "moe-aaaaaa")
    assert folder == real.resolve() / "moe-aaaaaa"
    assert runs.open_run_folder(tmp_path / "runs", "moe-aaaaaa") == folder


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="moved or deleted"):
        runs.open_run_folder(tmp_path, "moe-aaaaaa")


def test_a_wish_to_cancel_appears_whole(tmp_path: Path) -> None:
    runs.request_cancel(tmp_path, force=False)
    assert (tmp_path / "control" / "cancel").read_text() == "cancel\n"
    runs.request_cancel(tmp_path, force=True)
    assert (tmp_path / "control" / "cancel").read_text() == "force\n"
    assert os.listdir(tmp_path / "control") == ["cancel"]


@pytest.mark.parametrize(
    ("reference", "run_id"),
    [
        ("@last", "moe-bbbbbb"),
        ("moe-aaaaaa", "moe-aaaaaa"),
        ("moe", "moe-bbbbbb"),  # a name is its newest run, though it begins four ids
        ("moe-t", "moe-text-cccccc"),
        ("d", "dense-dddddd"),
    ],
)
def test_a_job_is_found_by_id_name_beginning_and_last(reference: str, run_id: str) -> None:
    assert runs.resolve(reference, JOBS).run_id == run_id


@pytest.mark.parametrize(
    ("reference", "words", "candidates"),
    [
        ("mo", "3 run ids", ("moe-bbbbbb", "moe-text-cccccc", "moe-aaaaaa")),
        ("mooe", "did you mean", ("moe",)),
        ("zzz", "gangline ls --all", ()),
        ("", "no job", ()),
    ],
)
def test_none_or_several_are_not_found_and_candidates_are_named(
    reference: str, words: str, candidates: tuple[str, ...]
) -> None:
    with pytest.raises(NotFoundError, match=words) as caught:
        runs.resolve(reference, JOBS)
    assert set(candidates) <= set(caught.value.candidates)
    assert caught.value.exit_code == 3


def test_last_of_nothing_is_not_found() -> None:
    empty: list[Named] = []
    with pytest.raises(NotFoundError, match="gangline run"):
        runs.resolve("@last", empty)


@given(st.text())
def test_any_reference_is_a_job_or_not_found(reference: str) -> None:
    try:
        found = runs.resolve(reference, JOBS)
    except NotFoundError as error:
        json.dumps(error.candidates)
    else:
        assert found in JOBS
