"""Every branch of the decision about lost workers, and who is named as the cause."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.orchestrator.policy import Action, Cause, Loss, Situation, decide, root_cause


def loss(rank: int, cause: Cause = Cause.KILLED, time_s: float = 0.0) -> Loss:
    return Loss(rank, f"w{rank}", "node-7", cause, "SIGKILL", step=40, time_s=time_s)


def situation(**changes: Any) -> Situation:
    base = Situation(
        world_size=4,
        losses=(loss(1),),
        num_missing=1,
        num_ready_spares=0,
        num_placeable=0,
        num_failures=1,
        max_failures=3,
        restart_in_place=True,
        legal_sizes=(2, 4),
        min_workers=None,
    )
    return dataclasses.replace(base, **changes)


def test_no_loss_goes_on() -> None:
    assert decide(situation(losses=(), num_missing=0)).action is Action.CONTINUE


def test_a_warm_spare_comes_before_a_cold_restart() -> None:
    decision = decide(situation(num_ready_spares=1, num_placeable=1))
    assert decision.action is Action.REPLACE
    assert decision.world_size == 4


def test_without_a_spare_the_rank_starts_again_in_place() -> None:
    assert decide(situation(num_placeable=1)).action is Action.RESTART


def test_spares_and_free_places_add_up() -> None:
    two = (loss(1), loss(2))
    enough = situation(losses=two, num_missing=2, num_ready_spares=1, num_placeable=1)
    assert decide(enough).action is Action.RESTART
    short = dataclasses.replace(enough, num_placeable=0)
    assert decide(short).action is Action.FAIL


def test_shrinks_to_the_largest_legal_size_at_or_above_min() -> None:
    decision = decide(situation(min_workers=1, legal_sizes=(1, 2, 4)))
    assert decision.action is Action.RESIZE
    assert decision.world_size == 2
    assert "2 of 4 ranks" in decision.sentence


def test_does_not_shrink_below_min() -> None:
    decision = decide(situation(min_workers=3, legal_sizes=(1, 2, 4)))
    assert decision.action is Action.FAIL
    assert "workers.min is 3" in decision.sentence


def test_restart_in_place_can_be_forbidden() -> None:
    decision = decide(situation(num_placeable=1, restart_in_place=False))
    assert decision.action is Action.FAIL
    assert "faults.restart_in_place" in decision.sentence


def test_an_error_without_a_dead_process_restarts_all_ranks() -> None:
    raised = situation(losses=(loss(2, Cause.RAISED),), num_missing=0)
    assert decide(raised).action is Action.RESTART


def test_too_many_failures_end_the_job_and_name_the_first_rank() -> None:
    decision = decide(situation(num_failures=4, num_ready_spares=1))
    assert decision.action is Action.FAIL
    for part in ("rank 1", "node-7", "after step 40", "faults.max_failures", "3"):
        assert part in decision.sentence


def test_the_sentence_ends_with_the_last_lines_of_the_rank() -> None:
    last = dataclasses.replace(loss(1), last_lines=("step 40", "boom"))
    assert last.sentence().endswith("its last lines: step 40 | boom")


def test_a_witness_is_not_blamed() -> None:
    witness = loss(0, Cause.COMMUNICATION, time_s=1.0)
    culprit = loss(3, Cause.KILLED, time_s=2.0)
    assert root_cause((witness, culprit)).rank == 3
    assert root_cause((witness,)).rank == 0


@pytest.mark.parametrize("cause", list(Cause))
def test_every_cause_has_a_sentence(cause: Cause) -> None:
    assert "rank 1 on node-7" in loss(1, cause).sentence()


@given(
    num_missing=st.integers(0, 4),
    num_ready_spares=st.integers(0, 4),
    num_placeable=st.integers(0, 4),
    num_failures=st.integers(1, 6),
    min_workers=st.none() | st.integers(1, 4),
    restart_in_place=st.booleans(),
)
def test_never_promises_ranks_that_cannot_be_had(**drawn: Any) -> None:
    case = situation(**drawn)
    decision = decide(case)
    usable = case.world_size - case.num_missing + case.num_ready_spares
    match decision.action:
        case Action.REPLACE:
            assert usable >= case.world_size
        case Action.RESTART:
            assert case.num_missing == 0 or usable + case.num_placeable >= case.world_size
        case Action.RESIZE:
            assert case.min_workers is not None
            assert case.min_workers <= decision.world_size <= usable
            assert decision.world_size in case.legal_sizes
    if case.num_failures > case.max_failures:
        assert decision.action is Action.FAIL
