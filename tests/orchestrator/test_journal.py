"""The journal survives a torn write, and a state rebuilt from it equals the one that wrote it."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.orchestrator.journal import Journal, read_journal, read_status, write_status
from gangline.orchestrator.run_state import apply, replay

EVENTS: list[tuple[str, dict]] = [
    ("session_started", {"session": "s1"}),
    ("worker_created", {"worker_id": "w0", "slot": 0}),
    ("worker_created", {"worker_id": "w1", "slot": 1}),
    ("prepared", {"shared": {"dataset": {}}}),
    ("worker_ready", {"worker_id": "w0", "info": {"pid": 1, "host": "n1"}}),
    ("worker_ready", {"worker_id": "w1", "info": {"pid": 2, "host": "n1"}}),
    ("generation_forming", {"generation": 0}),
    ("generation_started", {"generation": 0, "ranks": ["w0"]}),
    ("failure", {"generation": 0, "num_lost": 1, "max_step": 12}),
    ("worker_ended", {"generation": 0, "worker_id": "w0"}),
    ("generation_forming", {"generation": 1}),
    ("generation_started", {"generation": 1, "ranks": ["w1"]}),
    ("recovered", {"generation": 1}),
    ("finished", {"generation": 1, "state": "SUCCEEDED", "reason": ""}),
]


def write(journal: Journal, events: list[tuple[str, dict]]) -> None:
    for event, fields in events:
        fields = dict(fields)
        journal.append(event, event, generation=fields.pop("generation", -1), **fields)


def test_a_reopened_journal_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    write(first, EVENTS[:3])
    first.close()
    second = Journal(path)
    second.append("worker_ended", "w1 is gone", generation=0, worker_id="w1")
    assert [r["seq"] for r in read_journal(path)] == [0, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 2000))
def test_a_torn_tail_costs_only_the_last_event(tmp_path_factory, cut: int) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(path)
    write(journal, EVENTS)
    journal.close()
    content = path.read_bytes()
    cut = min(cut, len(content))
    path.write_bytes(content[:cut])
    num_whole = content[:cut].count(b"\n")
    assert len(list(read_journal(path))) == num_whole
    again = Journal(path)
    again.append("worker_ended", "after the crash", generation=0, worker_id="w9")
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [r["seq"] for r in records] == list(range(num_whole + 1))


def test_replay_of_every_prefix_equals_applying_one_by_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    write(journal, EVENTS)
    state = replay([])
    for num, record in enumerate(journal.events, start=1):
        apply(state, record)
        assert state == replay(journal.events[:num])
    assert state.generation == 1
    assert state.ranks == ["w1"]
    assert set(state.workers) == {"w1"}
    assert (state.num_failures, state.num_restarts, state.failure) == (1, 1, None)
    assert state.final is not None


def test_a_new_session_forgets_workers_and_keeps_the_generation(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    write(journal, [*EVENTS, ("session_started", {"generation": 1, "session": "s2"})])
    state = replay(journal.events)
    assert (state.workers, state.ranks, state.is_generation_running) == ({}, [], False)
    assert (state.generation, state.num_failures, state.final) == (1, 0, None)
    assert state.num_workers_ever == 2, "worker ids are never used again"
    assert state.shared is not None, "the prepared data is kept"


def test_status_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_status(path) is None
    write_status(path, {"state": "RUNNING"})
    write_status(path, {"state": "SUCCEEDED"})
    assert read_status(path) == {"state": "SUCCEEDED"}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
