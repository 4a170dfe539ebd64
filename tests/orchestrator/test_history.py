"""The job table: many processes at once, damaged and newer files, rebuilt from run folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from gangline.orchestrator.errors import GanglineError, NotFoundError
from gangline.orchestrator.history import FILE_NAME, SCHEMA_VERSION, History, JobRow, new_row


def a_row(run_id: str = "moe-aaaaaa", **changes: object) -> JobRow:
    row = new_row(run_id, name="moe", kind="train", mode="run", run_dir=Path("/runs") / run_id)
    return replace(row, **changes)  # type: ignore[arg-type]


def test_a_row_comes_back_as_it_went_in(tmp_path: Path) -> None:
    row = a_row(mode="submit", address="http://h:1", submission_id="s", token_file="/t", job="{}")
    history = History(tmp_path)
    history.add(row)
    history.close()
    assert History(tmp_path).get(row.run_id) == row


def test_reading_makes_no_file(tmp_path: Path) -> None:
    history = History(tmp_path / "runs")
    assert history.rows() == []
    with pytest.raises(NotFoundError):
        history.get("moe-aaaaaa")
    assert not (tmp_path / "runs").exists()


def test_an_update_stamps_the_time_and_keeps_the_rest(tmp_path: Path) -> None:
    history = History(tmp_path)
    row = a_row(updated_at=1.0)
    history.add(row)
    changed = history.update(row.run_id, state="FAILED", reason="why")
    assert changed.updated_at > 1.0
    assert changed == replace(row, state="FAILED", reason="why", updated_at=changed.updated_at)
    assert changed.is_terminal
    with pytest.raises(NotFoundError):
        history.update("nobody", state="FAILED")


def test_the_same_run_id_is_refused(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.add(a_row())
    with pytest.raises(GanglineError, match="refused a row"):
        history.add(a_row())
    assert len(history.rows()) == 1


def test_an_attempt_can_be_begun_once(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.add(a_row(state="FAILED"))
    seen = history.get("moe-aaaaaa")
    begun = history.begin_attempt(seen, state="STARTING", status_after=5.0)
    assert (begun.num_resumes, begun.state, begun.status_after) == (1, "STARTING", 5.0)
    with pytest.raises(GanglineError, match="resumed by another"):
        History(tmp_path).begin_attempt(seen, state="STARTING")


def _add_many(root: str, worker: int) -> None:
    history = History(Path(root))
    for index in range(20):
        history.add(a_row(f"moe-w{worker}-{index}"))
        history.update(f"moe-w{worker}-{index}", state="SUCCEEDED")


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_many, args=(str(tmp_path), w)) for w in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    rows = History(tmp_path).rows()
    assert len(rows) == 120
    assert {row.state for row in rows} == {"SUCCEEDED"}


@pytest.mark.parametrize("damage", ["header", "middle"])
def test_a_damaged_table_names_its_mend_and_the_mend_works(tmp_path: Path, damage: str) -> None:
    history = History(tmp_path)
    for index in range(200):
        history.add(a_row(f"moe-{index}", reason="x" * 100))
    history.close()
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    where = slice(0, 100) if damage == "header" else slice(4096, len(content))
    content[where] = os.urandom(len(content[where]))
    path.write_bytes(content)
    folder = a_run_folder(tmp_path, "moe-kept", "SUCCEEDED")
    with pytest.raises(GanglineError, match="move it away"):
        History(tmp_path).rows()
    path.rename(tmp_path / "away")
    (row,) = History(tmp_path).rows()
    assert (row.run_id, row.state, row.run_dir) == ("moe-kept", "SUCCEEDED", str(folder))


def a_run_folder(root: Path, run_id: str, state: str) -> Path:
    folder = root / run_id
    folder.mkdir(parents=True)
    status = {"run_id": run_id, "name": "moe", "kind": "train", "state": state, "updated_at": 9.0}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "journal.jsonl").write_text('{"seq": 0, "time": 7.0}\n')
    return folder


def test_a_lost_table_is_rebuilt_from_the_run_folders(tmp_path: Path) -> None:
    a_run_folder(tmp_path, "moe-aaaaaa", "SUCCEEDED")
    a_run_folder(tmp_path, "moe-bbbbbb", "FAILED")
    (tmp_path / "not a run").mkdir()
    (tmp_path / "moe-linked").symlink_to(tmp_path / "moe-aaaaaa")
    (tmp_path / "no-status").mkdir()
    rows = {row.run_id: row for row in History(tmp_path).rows()}
    assert set(rows) == {"moe-aaaaaa", "moe-bbbbbb"}
    assert rows["moe-bbbbbb"].state == "FAILED"
    assert rows["moe-aaaaaa"].created_at == 7.0


def test_a_newer_table_is_left_alone(tmp_path: Path) -> None:
    History(tmp_path).add(a_row())
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(GanglineError, match="newer Gangline"):
        History(tmp_path).rows()


def test_a_table_that_another_process_holds_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gangline.orchestrator.history._BUSY_TIMEOUT_S", 0.05)
    History(tmp_path).add(a_row())
    holder = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(GanglineError, match="another process holds it"):
        History(tmp_path).add(a_row("moe-bbbbbb"))
    holder.close()
