"""Following a run folder: torn lines, files that come late, shrink or are replaced, bad bytes."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.orchestrator.follow import LineReader, RunFollower, TextFollower


def texts(records: list[dict[str, Any]]) -> list[tuple[int | None, str]]:
    return [(record["rank"], record["text"]) for record in records if record["type"] == "log"]


def a_run(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def test_a_line_is_passed_on_once_it_is_whole(tmp_path: Path) -> None:
    reader = LineReader(tmp_path / "log")
    assert reader.read() == []  # not there yet
    append(tmp_path / "log", b"one\ntw")
    assert reader.read() == ["one"]
    assert reader.read() == []
    append(tmp_path / "log", b"o\r\nthree")
    assert reader.read() == ["two"]
    assert reader.take_rest() == ["three"]
    assert reader.take_rest() == []


def test_bad_bytes_do_not_stop_the_reader(tmp_path: Path) -> None:
    append(tmp_path / "log", b"\xff\xfe\x00 caf\xc3\xa9 \xc3\n")
    assert LineReader(tmp_path / "log").read() == ["��\x00 café �"]


def test_a_truncated_file_is_read_from_its_start(tmp_path: Path) -> None:
    reader = LineReader(tmp_path / "log")
    append(tmp_path / "log", b"old line\nunfinished")
    assert reader.read() == ["old line"]
    os.truncate(tmp_path / "log", 0)
    append(tmp_path / "log", b"new\n")
    assert reader.read() == ["new"]


def test_a_replaced_file_is_read_to_its_end_and_then_the_new_one(tmp_path: Path) -> None:
    reader = LineReader(tmp_path / "log")
    append(tmp_path / "log", b"one\n")
    assert reader.read() == ["one"]
    append(tmp_path / "log", b"two\n")
    (tmp_path / "log").rename(tmp_path / "log.1")
    append(tmp_path / "log", b"three\n")
    assert reader.read() == ["two", "three"]


def test_a_line_without_end_comes_in_pieces(tmp_path: Path) -> None:
    append(tmp_path / "log", b"x" * 200_000)
    reader = LineReader(tmp_path / "log")
    assert "".join(reader.read() + reader.take_rest()) == "x" * 200_000


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=30),
    cuts=st.lists(st.integers(0, 900), max_size=12),
)
def test_no_cut_of_the_writes_changes_the_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("cuts") / "log"
    data = b"".join(line + b"\n" for line in lines)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reader = LineReader(path)
    found: list[str] = []
    for first, last in itertools.pairwise(edges):
        append(path, data[first:last])
        found += reader.read()
    assert found == [line.rstrip(b"\r").decode("utf-8", "replace") for line in lines]


def test_the_three_sources_become_records(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    follower = RunFollower(run)
    assert follower.poll() == []
    append(run / "journal.jsonl", b'{"seq": 0, "time": 5.0, "event": "started", "message": "m"}\n')
    append(run / "logs" / "rank-1.log", b"hello\n")
    append(run / "logs" / "rank-10.log", b"far\n")
    append(run / "logs" / "controller.log", b"internal\n")
    (run / "status.json").write_text(json.dumps({"state": "RUNNING", "step": 3, "updated_at": 6.0}))
    log_1, log_10, event, progress = follower.poll()
    assert texts([log_1, log_10]) == [(1, "hello"), (10, "far")]
    assert (event["type"], event["event"], event["time"]) == ("event", "started", 5.0)
    assert (progress["type"], progress["step"], progress["time"]) == ("progress", 3, 6.0)
    assert follower.poll() == []  # nothing is told twice


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for rank in range(3):
        append(run / "logs" / f"rank-{rank}.log", b"line\n")
    append(run / "journal.jsonl", b'{"seq": 0, "event": "e"}\n')
    assert texts(RunFollower(run, types=("log",), ranks=(1,)).finish()) == [(1, "line")]
    assert [r["type"] for r in RunFollower(run, types=("event",)).finish()] == ["event"]


def test_from_now_on_leaves_out_what_is_there(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    append(run / "logs" / "rank-0.log", b"old\n")
    append(run / "journal.jsonl", b'{"seq": 0, "event": "old"}\n')
    (run / "status.json").write_text('{"state": "FAILED"}')
    follower = RunFollower(run, from_start=False)
    assert follower.poll() == []
    append(run / "logs" / "rank-0.log", b"new\n")
    append(run / "logs" / "rank-1.log", b"a new file is new as a whole\n")
    append(run / "journal.jsonl", b'{"seq": 1, "event": "new"}\n')
    records = follower.poll()
    assert texts(records) == [(0, "new"), (1, "a new file is new as a whole")]
    assert [r["event"] for r in records if r["type"] == "event"] == ["new"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff"])
def test_a_status_that_cannot_be_read_is_passed_over(tmp_path: Path, content: bytes) -> None:
    run = a_run(tmp_path)
    (run / "status.json").write_bytes(content)
    follower = RunFollower(run)
    assert follower.poll() == []
    (run / "new").write_text('{"state": "RUNNING"}')
    (run / "new").replace(run / "status.json")
    assert [record["state"] for record in follower.poll()] == ["RUNNING"]


@pytest.mark.parametrize("line", [b"{torn", b"17", b"\xff\xfe"])
def test_a_journal_line_that_is_no_event_is_shown_not_lost(tmp_path: Path, line: bytes) -> None:
    append(tmp_path / "journal.jsonl", line + b"\n")
    (record,) = RunFollower(tmp_path).poll()
    assert record["type"] == "log"
    assert record["text"].startswith("journal: ")


def test_finish_returns_the_unfinished_last_line(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    append(run / "logs" / "rank-0.log", b"Segmentation fau")
    follower = RunFollower(run)
    assert follower.poll() == []
    assert texts(follower.finish()) == [(0, "Segmentation fau")]


class Printed:
    """What a driver has printed so far; `fetch` returns all of it."""

    def __init__(self) -> None:
        self.text = ""
        self.num_fetches = 0

    def fetch(self) -> str:
        self.num_fetches += 1
        return self.text


def test_printed_records_are_told_once_and_other_lines_are_logs() -> None:
    printed = Printed()
    follower = TextFollower(printed.fetch)
    printed.text = 'Running entrypoint\n{"type": "event", "time": 1, "event": "e"}\n{"type": "eve'
    first = follower._look(whole_lines_only=True)
    assert texts(first) == [(None, "Running entrypoint")]
    assert [r["event"] for r in first if r["type"] == "event"] == ["e"]
    printed.text += 'nt", "time": 2, "event": "f"}\n{"type": "other"}\nTraceback'
    second = follower._look(whole_lines_only=True)
    assert [r["event"] for r in second if r["type"] == "event"] == ["f"]
    assert texts(second) == [(None, '{"type": "other"}')]
    assert texts(follower.finish()) == [(None, "Traceback")]
    assert follower.num_records == 2


def test_a_text_that_became_shorter_is_read_again() -> None:
    printed = Printed()
    follower = TextFollower(printed.fetch)
    printed.text = "one\ntwo\n"
    assert len(follower.finish()) == 2
    printed.text = "new\n"
    assert texts(follower.finish()) == [(None, "new")]


def test_printed_logs_are_chosen_by_rank() -> None:
    printed = Printed()
    printed.text = "".join(
        json.dumps({"type": "log", "time": 1, "rank": rank, "text": str(rank)}) + "\n"
        for rank in (0, 1, None)
    )
    follower = TextFollower(printed.fetch, types=("log",), ranks=(1,))
    assert texts(follower.finish()) == [(1, "1")]


def test_polls_are_spaced_out() -> None:
    printed = Printed()
    follower = TextFollower(printed.fetch)
    for _ in range(50):
        follower.poll()
    assert printed.num_fetches == 1
