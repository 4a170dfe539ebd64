"""The judge of scenarios: pure, from what is expected and what was recorded to what is wrong.

    judge(expect, timeline)       one Finding per expectation that does not hold; [] is a pass

Beside what is asked for, a run must have ended before the deadline, every fault must be proven to
have happened, and nothing may be left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gangline.orchestrator.errors import STATE_EXIT_CODES
from gangline.orchestrator.expectations import (
    Expect,
    FirstFailed,
    StepTimeExpectation,
    TrafficExpectation,
)
from gangline.orchestrator.timeline import Timeline, median, step_times

_NUM_MIN_STEPS = 3


@dataclass(frozen=True)
class Finding:
    """One expectation that does not hold."""

    expectation: str
    expected: str
    found: str

    def line(self) -> str:
        """Write it on one line."""
        return f"{self.expectation}: expected {self.expected}, found {self.found}"


def judge(expect: Expect, timeline: Timeline) -> list[Finding]:
    """Return what does not hold, in the order of the fields."""
    findings = [
        *_always(timeline),
        *_end(expect, timeline),
        *_recovery(expect, timeline),
        *_times(expect, timeline),
        *_exactness(expect, timeline),
        *_metrics(expect, timeline),
    ]
    for number, wanted in enumerate(expect.step_time):
        findings += _step_time(f"step_time[{number}]", wanted, timeline)
    for number, traffic in enumerate(expect.traffic):
        findings += _traffic(f"traffic[{number}]", traffic, timeline)
    findings += _events(expect, timeline)
    findings += _checkpoints(expect, timeline)
    findings += _resumed(expect, timeline)
    return findings


def _always(timeline: Timeline) -> Iterator[Finding]:
    if timeline.exit_code is None:
        yield Finding("timeout_s", "the run to end before the deadline", "it had to be ended")
    for fault in timeline.faults:
        if fault.doubt:
            yield Finding(f"fault {fault.label}", "it to happen", f"it did not: {fault.doubt}")
    if timeline.leftovers:
        yield Finding("leftovers", "no process left behind", ", ".join(timeline.leftovers))


def _end(expect: Expect, timeline: Timeline) -> Iterator[Finding]:
    found = f"{timeline.state or 'no state'} ({timeline.reason})"
    if timeline.state != expect.state:
        yield Finding("state", expect.state, found)
    wanted = STATE_EXIT_CODES[expect.state] if expect.exit_code is None else expect.exit_code
    if timeline.exit_code is not None and timeline.exit_code != wanted:
        yield Finding("exit_code", str(int(wanted)), str(timeline.exit_code))
    for part in expect.reason:
        if part not in timeline.reason:
            yield Finding("reason", f"{part!r} in it", repr(timeline.reason))


def _recovery(expect: Expect, timeline: Timeline) -> Iterator[Finding]:
    decisions = timeline.events_of("decision")
    actions = [decision["action"] for decision in decisions]
    if expect.actions is not None and actions != expect.actions:
        yield Finding("actions", _listed(expect.actions), _listed(actions))
    recoveries = timeline.events_of("recovered")
    if expect.recoveries is not None and len(recoveries) != expect.recoveries:
        yield Finding("recoveries", str(expect.recoveries), str(len(recoveries)))
    if expect.first_failed is not None:
        yield from _first_failed(expect.first_failed, timeline)
    lost = sum(recovery["lost_steps"] for recovery in recoveries)
    if expect.lost_steps_at_most is not None and lost > expect.lost_steps_at_most:
        yield Finding("lost_steps_at_most", str(expect.lost_steps_at_most), str(lost))


def _first_failed(wanted: FirstFailed, timeline: Timeline) -> Iterator[Finding]:
    decisions = timeline.events_of("decision")
    sentence = decisions[0]["message"] if decisions else ""
    found = repr(sentence) if sentence else "no decision"
    struck = timeline.faults[0] if timeline.faults else None
    rank = struck.rank if wanted.rank == "struck" and struck else wanted.rank
    host = struck.host if wanted.host == "struck" and struck else wanted.host
    if wanted.rank is not None and not sentence.startswith(f"rank {rank} "):
        yield Finding("first_failed.rank", f"`rank {rank}` first", found)
    if wanted.host is not None and f" on {host} " not in sentence:
        yield Finding("first_failed.host", f"`on {host}`", found)
    if wanted.how is not None and wanted.how not in sentence:
        yield Finding("first_failed.how", repr(wanted.how), found)


def _times(expect: Expect, timeline: Timeline) -> Iterator[Finding]:
    begun = [fault.begun_at for fault in timeline.faults if fault.begun_at is not None]
    failures = [e for e in timeline.events_of("failure") if begun and e["time"] >= min(begun)]
    if expect.detected_within_s is not None:
        wanted = f"at most {expect.detected_within_s:g} s"
        if not failures:
            yield Finding("detected_within_s", wanted, "no failure after the fault")
        elif failures[0]["time"] - min(begun) > expect.detected_within_s:
            yield Finding("detected_within_s", wanted, f"{failures[0]['time'] - min(begun):.2f} s")
    if expect.recovered_within_s is not None:
        wanted = f"at most {expect.recovered_within_s:g} s"
        after = failures[0]["generation"] if failures else None
        again = [s for s in timeline.steps if after is not None and s["generation"] > after]
        if not again:
            yield Finding("recovered_within_s", wanted, "no step of a later generation")
        elif again[0]["time"] - min(begun) > expect.recovered_within_s:
            yield Finding("recovered_within_s", wanted, f"{again[0]['time'] - min(begun):.2f} s")


def _exactness(expect: Expect, timeline: Timeline) -> Iterator[Finding]:
    if expect.weights is not None:
        twin = timeline.twin or {}
        wanted = twin.get("weights_sha256") or f"none, the twin ended {twin.get('state', 'never')}"
        # A resumed job's weights are those at its very end.
        weights = (timeline.resumed or {}).get("weights_sha256") or timeline.weights_sha256
        if not weights or weights != wanted:
            yield Finding("weights", f"{wanted[:16]} (undisturbed)", weights[:16] or "none")
    if expect.samples is not None:
        samples = timeline.samples
        if samples is None:
            yield Finding("samples", "a ledger", "none; set training.sample_ledger")
        elif samples["num_missing"] or samples["num_repeated"] or not samples["num_taken"]:
            found = f"{samples['num_missing']} missing, {samples['num_repeated']} repeated"
            yield Finding("samples", f"{samples['num_expected']} samples, each once", found)


def _metrics(expect: Expect, timeline: Timeline) -> Iterator[Finding]:
    wanted, metrics = expect.metrics, timeline.metrics
    if wanted is None:
        return
    if metrics is None:
        yield Finding("metrics", "an MLflow run", "none; see `mlflow` and tracking.enabled")
        return
    if wanted.exactly_once and (metrics["num_missing"] or metrics["num_doubled"]):
        found = f"{metrics['num_missing']} missing, {metrics['num_doubled']} twice"
        yield Finding("metrics.exactly_once", f"{metrics['num_expected']} points", found)
    down_s = metrics["down_s"]
    if wanted.down_at_least_s is not None and down_s < wanted.down_at_least_s:
        yield Finding("metrics.down_at_least_s", f"{wanted.down_at_least_s:g}", f"{down_s:.1f}")


def _step_time(where: str, wanted: StepTimeExpectation, timeline: Timeline) -> Iterator[Finding]:
    times = step_times(timeline, timeline.fault(wanted.fault))
    before = median(times.before_s)
    if len(times.before_s) < _NUM_MIN_STEPS:
        counted = f"{len(times.before_s)}"
        yield Finding(f"{where}.before", f"at least {_NUM_MIN_STEPS} warm steps", counted)
        return
    during, after = median(times.during_s), median(times.after_s)
    if wanted.during_at_least is not None and not during >= wanted.during_at_least * before:
        yield _ratio(f"{where}.during_at_least", ">=", wanted.during_at_least, during, before)
    if wanted.during_at_most is not None and not during <= wanted.during_at_most * before:
        yield _ratio(f"{where}.during_at_most", "<=", wanted.during_at_most, during, before)
    if wanted.after_at_most is not None:
        if len(times.after_s) < _NUM_MIN_STEPS:
            counted = f"{len(times.after_s)}"
            yield Finding(f"{where}.after", f"at least {_NUM_MIN_STEPS} warm steps", counted)
        elif after > wanted.after_at_most * before:
            yield _ratio(f"{where}.after_at_most", "<=", wanted.after_at_most, after, before)
    longest_s = max(times.during_s, default=0.0)
    if wanted.longest_s_at_least is not None and longest_s < wanted.longest_s_at_least:
        found = f"{longest_s:.2f}"
        yield Finding(f"{where}.longest_s_at_least", f"{wanted.longest_s_at_least:g}", found)


def _ratio(where: str, sign: str, wanted: float, value_s: float, before_s: float) -> Finding:
    found = f"{value_s / before_s:.2f} ({value_s * 1e3:.0f} ms against {before_s * 1e3:.0f} ms)"
    return Finding(where, f"{sign} {wanted:g} times the step before", found)


def _traffic(where: str, wanted: TrafficExpectation, timeline: Timeline) -> Iterator[Finding]:
    begin, end = timeline.command_started_at, timeline.command_ended_at
    names = [wanted.link] if wanted.link else []
    if wanted.fault is not None:
        fault = timeline.fault(wanted.fault)
        if fault.begun_at is None:
            yield Finding(where, f"bytes {wanted.when} {wanted.fault}", "it never began")
            return
        spared = [name for name in timeline.links if "-" in name and name not in fault.links]
        names = names or (fault.links if wanted.of == "struck" else spared)
        spans = {
            "before": (begin, fault.begun_at),
            "during": (fault.begun_at, timeline.end_of(fault)),
            "after": (timeline.end_of(fault), end),
        }
        begin, end = spans[wanted.when]
    unknown = [name for name in names if name not in timeline.links]
    if unknown or not names:
        yield Finding(where, "counters of the links", f"none of {', '.join(unknown) or 'any'}")
        return
    sent = sum(timeline.links[name].sent_bytes(wanted.direction, begin, end) for name in names)
    shown = f"{where} {', '.join(names)} {wanted.when if wanted.fault else ''}".strip()
    if wanted.at_least_bytes is not None and sent < wanted.at_least_bytes:
        yield Finding(shown, f"at least {wanted.at_least_bytes} B", f"{sent} B")
    if wanted.at_most_bytes is not None and sent > wanted.at_most_bytes:
        yield Finding(shown, f"at most {wanted.at_most_bytes} B", f"{sent} B")


def _events(expect: Expect, timeline: Timeline) -> Iterator[Finding]:
    if expect.events is None:
        return
    for name in expect.events.must:
        if not timeline.events_of(name):
            yield Finding("events.must", name, "no such event")
    for name in expect.events.must_not:
        for event in timeline.events_of(name)[:1]:
            yield Finding("events.must_not", f"no {name}", repr(event["message"]))


def _checkpoints(expect: Expect, timeline: Timeline) -> Iterator[Finding]:
    wanted = expect.checkpoints
    if wanted is None:
        return
    failed = [c for c in timeline.checkpoints if c["status"] == "failed"]
    last_end = max((timeline.end_of(fault) for fault in timeline.faults), default=0.0)
    committed = [
        c for c in timeline.checkpoints if c["status"] == "committed" and c["time"] > last_end
    ]
    if wanted.at_least_failed is not None and len(failed) < wanted.at_least_failed:
        yield Finding("checkpoints.at_least_failed", str(wanted.at_least_failed), str(len(failed)))
    if wanted.at_most_failed is not None and len(failed) > wanted.at_most_failed:
        found = f"{len(failed)}: {failed[0]['reason']}"
        yield Finding("checkpoints.at_most_failed", str(wanted.at_most_failed), found)
    least = wanted.at_least_committed_after
    if least is not None and len(committed) < least:
        yield Finding("checkpoints.at_least_committed_after", str(least), str(len(committed)))


def _resumed(expect: Expect, timeline: Timeline) -> Iterator[Finding]:
    wanted, resumed = expect.resumed, timeline.resumed
    if wanted is None:
        return
    if resumed is None:
        yield Finding("resumed", "a resume", "none; set `resume`")
        return
    if resumed["state"] != wanted.state:
        yield Finding("resumed.state", wanted.state, f"{resumed['state']} ({resumed['reason']})")
    if resumed["from_step"] is None or resumed["from_step"] < wanted.from_step_at_least:
        found = str(resumed["from_step"])
        yield Finding("resumed.from_step_at_least", str(wanted.from_step_at_least), found)


def _listed(items: Sequence[str]) -> str:
    return "[" + ", ".join(items) + "]"
