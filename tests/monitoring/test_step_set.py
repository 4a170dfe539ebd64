from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from gangline.monitoring.step_set import StepSet


@given(st.lists(st.integers(0, 60), max_size=60))
def test_is_a_set_in_any_order(steps: list[int]):
    ours, truth = StepSet(), set()
    for step in steps:
        ours.add(step)
        truth.add(step)
        assert {s for s in range(62) if s in ours} == truth


@given(st.lists(st.integers(0, 60), max_size=40), st.lists(st.integers(0, 60), max_size=10))
def test_state_goes_through_json(steps: list[int], more: list[int]):
    ours = StepSet()
    for step in steps:
        ours.add(step)
    again = StepSet(json.loads(json.dumps(ours.state())))
    for step in more:
        ours.add(step)
        again.add(step)
    assert [s in ours for s in range(62)] == [s in again for s in range(62)]


def test_memory_does_not_grow_with_the_steps():
    every, tenth, with_hole = StepSet(), StepSet(), StepSet()
    for step in range(100_000):
        every.add(step)
        tenth.add(step * 10)
        if step != 5:
            with_hole.add(step)
    with_hole.add(5)
    assert every.state()["runs"] == [[0, 99_999, 1]]
    assert tenth.state()["runs"] == [[0, 999_990, 10]]
    assert len(with_hole.state()["runs"]) == 2
    assert 5 in with_hole
    assert 15 not in tenth
