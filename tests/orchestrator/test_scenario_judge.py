"""The judge: every expectation holds of a run that fits it, and fails on one that does not."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gangline.orchestrator import timeline as timeline_module
from gangline.orchestrator.expectations import Expect
from gangline.orchestrator.scenario_judge import judge
from gangline.orchestrator.timeline import Proof, Timeline, step_times, tenures

from . import scenario_timelines as made


def expect(**fields: Any) -> Expect:
    return Expect.model_validate_json(json.dumps(fields))


def wrong(expectation: Expect, timeline: Timeline) -> list[str]:
    return [finding.expectation for finding in judge(expectation, timeline)]


# What is expected, of which run, and the change of the record that breaks it.
Break = Callable[[Timeline], None]


def set_to(**values: Any) -> Break:
    def change(timeline: Timeline) -> None:
        for name, value in values.items():
            setattr(timeline, name, value)

    return change


def set_event(name: str, **values: Any) -> Break:
    def change(timeline: Timeline) -> None:
        for event in timeline.events_of(name):
            event.update(values)

    return change


def drop_event(name: str) -> Break:
    def change(timeline: Timeline) -> None:
        timeline.events = [event for event in timeline.events if event["event"] != name]

    return change


def drop_steps(first: int | None, last: int | None) -> Break:
    def change(timeline: Timeline) -> None:
        del timeline.steps[first:last]

    return change


def later(timeline: Timeline) -> None:
    for step in timeline.steps[40:]:
        step["time"] += 5


def set_fault(**values: Any) -> Break:
    def change(timeline: Timeline) -> None:
        for name, value in values.items():
            setattr(timeline.faults[0], name, value)

    return change


def same_speed(timeline: Timeline) -> None:
    for step in timeline.steps:
        step["step_s"] = made.STEP_S


def slow_for_ever(timeline: Timeline) -> None:
    for step in timeline.steps[60:]:
        step["step_s"] = 4 * made.STEP_S


def with_(name: str, **values: Any) -> Break:
    def change(timeline: Timeline) -> None:
        getattr(timeline, name).update(values)

    return change


METRICS = {"down_s": 3.0, "num_expected": 100, "num_missing": 0, "num_doubled": 0}
RESUMED = {"state": "SUCCEEDED", "reason": "", "weights_sha256": "", "from_step": 35}


def tracked() -> Timeline:
    timeline = made.undisturbed()
    timeline.metrics = dict(METRICS)
    timeline.resumed = dict(RESUMED)
    return timeline


CASES = [
    ("state", {}, made.killed, set_to(state="FAILED")),
    ("exit_code", {}, made.killed, set_to(exit_code=100)),
    ("exit_code", {"exit_code": 0}, made.killed, set_to(exit_code=1)),
    ("timeout_s", {}, made.killed, set_to(exit_code=None)),
    ("leftovers", {}, made.killed, set_to(leftovers=["host0: pid 7 ray::Worker"])),
    ("fault kill_worker", {}, made.killed, set_fault(begun_at=None)),
    ("fault kill_worker", {}, made.killed, set_fault(proofs=[])),
    ("fault kill_worker", {}, made.killed, set_fault(proofs=[Proof("pid", "there", False)])),
    ("fault kill_worker", {}, made.killed, set_fault(error="there is no rank 1")),
    ("fault kill_worker", {}, made.killed, set_fault(is_left_out=True)),
    ("reason", {"reason": ["finished"]}, made.killed, set_to(reason="cancelled")),
    ("actions", {"actions": ["replace"]}, made.killed, set_event("decision", action="restart")),
    ("actions", {"actions": ["replace"]}, made.killed, drop_event("decision")),
    ("recoveries", {"recoveries": 1}, made.killed, drop_event("recovered")),
    (
        "first_failed.rank",
        {"first_failed": {"rank": 1, "host": "host1", "how": "was killed"}},
        made.killed,
        set_event("decision", message="rank 0 on host1 was killed after step 40"),
    ),
    (
        "first_failed.rank",
        {"first_failed": {"rank": "struck"}},
        made.killed,
        set_fault(rank=0),
    ),
    (
        "first_failed.host",
        {"first_failed": {"host": "struck"}},
        made.killed,
        set_fault(host="host2"),
    ),
    (
        "first_failed.how",
        {"first_failed": {"how": "was killed"}},
        made.killed,
        set_event("decision", message="rank 1 on host1 lost a peer"),
    ),
    (
        "lost_steps_at_most",
        {"lost_steps_at_most": 10},
        made.killed,
        set_event("recovered", lost_steps=11),
    ),
    (
        "detected_within_s",
        {"detected_within_s": 1},
        made.killed,
        set_event("failure", time=made.START + 9),
    ),
    ("detected_within_s", {"detected_within_s": 1}, made.killed, drop_event("failure")),
    (
        "recovered_within_s",
        {"recovered_within_s": 2},
        made.killed,
        later,
    ),
    ("recovered_within_s", {"recovered_within_s": 2}, made.killed, drop_steps(40, None)),
    ("weights", {"weights": "as_undisturbed"}, made.killed, set_to(weights_sha256="b" * 64)),
    ("weights", {"weights": "as_undisturbed"}, made.killed, set_to(twin=None)),
    ("weights", {"weights": "as_undisturbed"}, made.killed, with_("twin", weights_sha256="")),
    ("samples", {"samples": "each_once"}, made.killed, with_("samples", num_missing=4)),
    ("samples", {"samples": "each_once"}, made.killed, with_("samples", num_repeated=1)),
    ("samples", {"samples": "each_once"}, made.killed, with_("samples", num_taken=0)),
    ("samples", {"samples": "each_once"}, made.killed, set_to(samples=None)),
    ("metrics.exactly_once", {"metrics": {}}, tracked, with_("metrics", num_missing=1)),
    ("metrics.exactly_once", {"metrics": {}}, tracked, with_("metrics", num_doubled=1)),
    (
        "metrics.down_at_least_s",
        {"metrics": {"down_at_least_s": 2}},
        tracked,
        with_("metrics", down_s=0.0),
    ),
    ("metrics", {"metrics": {}}, tracked, set_to(metrics=None)),
    ("resumed.state", {"resumed": {}}, tracked, with_("resumed", state="FAILED")),
    (
        "resumed.from_step_at_least",
        {"resumed": {"from_step_at_least": 35}},
        tracked,
        with_("resumed", from_step=0),
    ),
    ("resumed.from_step_at_least", {"resumed": {}}, tracked, with_("resumed", from_step=None)),
    ("resumed", {"resumed": {}}, tracked, set_to(resumed=None)),
    (
        "step_time[0].during_at_least",
        {"step_time": [{"fault": "slow_link", "during_at_least": 3}]},
        made.slowed,
        same_speed,
    ),
    (
        "step_time[0].during_at_most",
        {"step_time": [{"fault": "slow_link", "during_at_most": 5}]},
        made.slowed,
        lambda t: [step.update(step_s=1.0) for step in t.steps[40:60]],
    ),
    (
        "step_time[0].after_at_most",
        {"step_time": [{"fault": "slow_link", "after_at_most": 1.5}]},
        made.slowed,
        slow_for_ever,
    ),
    (
        "step_time[0].after",
        {"step_time": [{"fault": "slow_link", "after_at_most": 1.5}]},
        made.slowed,
        drop_steps(61, None),
    ),
    (
        "step_time[0].before",
        {"step_time": [{"fault": "slow_link", "during_at_least": 3}]},
        made.slowed,
        drop_steps(0, 36),
    ),
    (
        "step_time[0].longest_s_at_least",
        {"step_time": [{"fault": "slow_link", "longest_s_at_least": 0.15}]},
        made.slowed,
        same_speed,
    ),
    (
        "traffic[0] host1 during",
        {"traffic": [{"link": "host1", "fault": "slow_link", "at_least_bytes": 10**6}]},
        made.slowed,
        with_("links", host1=made.link_series(12, rate_bytes_s=1.0)),
    ),
    (
        "traffic[0] host1",
        {"traffic": [{"link": "host1", "direction": "egress", "at_most_bytes": 10**7}]},
        made.slowed,
        with_("links", host1=made.link_series(12, rate_bytes_s=1e7)),
    ),
    (
        "traffic[0]",
        {"traffic": [{"link": "host1", "at_most_bytes": 10**9}]},
        made.slowed,
        set_to(links={}),
    ),
    (
        "traffic[0] host1 during",
        {"traffic": [{"of": "struck", "fault": "slow_link", "at_most_bytes": 2 * 10**7}]},
        made.slowed,
        with_("links", host1=made.link_series(12, rate_bytes_s=1e7)),
    ),
    (
        "traffic[0] host1 before",
        {
            "traffic": [
                {"of": "struck", "when": "before", "fault": "slow_link", "at_least_bytes": 10**6}
            ]
        },
        made.slowed,
        with_("links", host1=made.link_series(12, rate_bytes_s=1.0)),
    ),
    (
        "traffic[0]",
        {"traffic": [{"of": "struck", "fault": "slow_link", "at_most_bytes": 10**9}]},
        made.slowed,
        set_fault(links=[]),
    ),
    ("events.must", {"events": {"must": ["recovered"]}}, made.killed, drop_event("recovered")),
    (
        "events.must_not",
        {"events": {"must_not": ["controller_restarted"]}},
        made.killed,
        lambda t: t.events.append(made.event("controller_restarted", 5.0)),
    ),
    (
        "checkpoints.at_most_failed",
        {"checkpoints": {"at_most_failed": 0}},
        made.slowed,
        lambda t: t.checkpoints[3].update(status="failed", reason="no space"),
    ),
    (
        "checkpoints.at_least_committed_after",
        {"checkpoints": {"at_least_committed_after": 1, "at_least_failed": 0}},
        made.undisturbed,
        lambda t: t.checkpoints.clear(),
    ),
]


@pytest.mark.parametrize(
    ("name", "fields", "make", "break_it"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_an_expectation_holds_and_its_opposite_is_found(
    name: str, fields: dict[str, Any], make: Callable[[], Timeline], break_it: Break
) -> None:
    expectation = expect(**fields)
    timeline = make()
    assert wrong(expectation, timeline) == []
    broken = copy.deepcopy(timeline)
    break_it(broken)
    assert name in wrong(expectation, broken)
    for finding in judge(expectation, broken):
        assert "\n" not in finding.line()


def test_a_failed_checkpoint_can_be_asked_for() -> None:
    timeline = made.slowed()
    assert wrong(expect(checkpoints={"at_least_failed": 1}), timeline) == [
        "checkpoints.at_least_failed"
    ]
    timeline.checkpoints[3]["status"] = "failed"
    assert wrong(expect(checkpoints={"at_least_failed": 1}), timeline) == []


def test_expectations_of_a_fault_fail_on_the_run_without_it() -> None:
    expectation = expect(
        actions=["replace"], recoveries=1, first_failed={"rank": 1}, detected_within_s=1
    )
    assert wrong(expectation, made.killed()) == []
    assert {"actions", "recoveries", "first_failed.rank", "detected_within_s"} <= set(
        wrong(expectation, made.undisturbed())
    )


def test_a_timeline_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    timeline = made.killed()
    timeline_module.save(timeline, tmp_path / "timeline.json")
    again = timeline_module.load(tmp_path / "timeline.json")
    assert dataclasses.asdict(again) == dataclasses.asdict(timeline)
    assert again.faults[0].proofs[0].holds
    (tmp_path / "timeline.json").write_text('{"version": 0}')
    with pytest.raises(ValueError, match="not a timeline of version"):
        timeline_module.load(tmp_path / "timeline.json")


def test_steps_are_sorted_by_where_they_stand_to_a_fault() -> None:
    timeline = made.slowed()
    times = step_times(timeline, timeline.faults[0])
    assert times.before_s == [made.STEP_S] * (40 - 3), "the first three are cold"
    assert times.during_s == [4 * made.STEP_S] * 20
    assert times.after_s == [made.STEP_S] * 39, "the first after it still pays"


def test_tenures_follow_the_ranks_through_a_replacement() -> None:
    found = [(t.worker_id, t.host, t.rank, t.generation) for t in tenures(made.killed())]
    assert found == [
        ("w0", "host0", 0, 0),
        ("w1", "host1", 1, 0),
        ("w0", "host0", 0, 1),
        ("w2", "host2", 1, 1),
    ]
    first, *_, last = tenures(made.killed())
    assert first.end < last.begin < last.end


@pytest.mark.parametrize("make", [made.undisturbed, made.killed, made.slowed])
def test_the_picture_is_drawn(make: Callable[[], Timeline], tmp_path: Path) -> None:
    from gangline.orchestrator.timeline_plot import draw

    timeline = make()
    draw(timeline, [tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "c.png"])
    text = (tmp_path / "a.svg").read_text()
    for name in timeline.hosts:
        assert f"<!-- {name} -->" in text
    for fault in timeline.faults:
        assert f"{fault.label}: {fault.target}" in text
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_a_run_that_never_began_is_drawn(tmp_path: Path) -> None:
    from gangline.orchestrator.timeline_plot import draw

    draw(Timeline("nothing", made.START, ["host0"]), [tmp_path / "a.png"])
    assert (tmp_path / "a.png").stat().st_size > 1000
