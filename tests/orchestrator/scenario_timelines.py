"""Timelines made up for tests: a run of two ranks on three hosts, with or without a killed rank."""

from typing import Any

from gangline.orchestrator.timeline import FaultRecord, LinkSeries, Proof, Timeline

START = 1_000_000.0
STEP_S = 0.05
NUM_STEPS = 100
KILLED_AT_STEP = 40


def event(name: str, at_s: float, generation: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "event": name,
        "time": START + at_s,
        "generation": generation,
        "message": fields.pop("message", name),
        **fields,
    }


def steps(generation: int, first: int, last: int, begin_s: float, step_s: float = STEP_S) -> list:
    return [
        {
            "generation": generation,
            "step": number,
            "time": START + begin_s + (number - first + 1) * step_s,
            "step_s": step_s,
            "loss": 1.0 / number,
            "committed": True,
        }
        for number in range(first, last + 1)
    ]


def workers() -> list[dict[str, Any]]:
    return [
        event("worker_ready", 3.0, worker_id=f"w{i}", info={"host": f"host{i}", "pid": 100 + i})
        for i in range(3)
    ]


def link_series(num_seconds: float, rate_bytes_s: float = 1e6) -> LinkSeries:
    series = LinkSeries(rate_mbit=400.0)
    for index in range(int(num_seconds * 5) + 1):
        series.times.append(START + index / 5)
        series.egress_bytes.append(int(index / 5 * rate_bytes_s))
        series.ingress_bytes.append(int(index / 5 * rate_bytes_s * 2))
    return series


def undisturbed() -> Timeline:
    """A run that nothing happened to."""
    end_s = 4.0 + NUM_STEPS * STEP_S
    timeline = Timeline("made-up", START - 5, ["host0", "host1", "host2"])
    timeline.command_started_at, timeline.command_ended_at = START, START + end_s + 0.5
    timeline.exit_code, timeline.state, timeline.reason = 0, "SUCCEEDED", "finished"
    timeline.weights_sha256 = "a" * 64
    timeline.num_steps = NUM_STEPS
    timeline.events = [
        event("session_started", 1.0, generation=-1),
        *workers(),
        event("generation_started", 3.9, ranks=["w0", "w1"]),
        event("finished", end_s + 0.2, state="SUCCEEDED"),
    ]
    timeline.steps = steps(0, 1, NUM_STEPS, 4.0)
    timeline.checkpoints = [
        {
            "generation": 0,
            "step": s,
            "status": "committed",
            "reason": "",
            "time": START + 4 + s / 20,
        }
        for s in range(10, NUM_STEPS + 1, 10)
    ]
    timeline.links = {f"host{i}": link_series(end_s) for i in range(3)}
    return timeline


def killed() -> Timeline:
    """A run whose rank 1 was killed after step 40 and replaced; 10 steps were done again."""
    timeline = undisturbed()
    struck_s = 4.0 + KILLED_AT_STEP * STEP_S + 0.01
    again_s = struck_s + 1.0
    end_s = again_s + (NUM_STEPS - 30) * STEP_S
    timeline.command_ended_at = START + end_s + 0.5
    sentence = "rank 1 on host1 was killed after step 40; a warm spare takes over"
    timeline.events = [
        *timeline.events[:-1],
        event("failure", struck_s + 0.1, ranks=[1], message="rank 1 on host1 was killed"),
        event("worker_ended", struck_s + 0.1, worker_id="w1"),
        event("decision", struck_s + 0.1, action="replace", message=sentence),
        event("generation_forming", struck_s + 0.2, generation=1),
        event("generation_started", struck_s + 0.5, generation=1, ranks=["w0", "w2"]),
        event("recovered", again_s, generation=1, lost_steps=10, recovery_s=0.9, resumed_step=30),
        event("finished", end_s + 0.2, generation=1, state="SUCCEEDED"),
    ]
    timeline.steps = [*steps(0, 1, 40, 4.0), *steps(1, 31, NUM_STEPS, again_s)]
    timeline.faults = [
        FaultRecord(
            "kill_worker",
            "kill_worker",
            "rank 1 on host1",
            rank=1,
            host="host1",
            begun_at=START + struck_s,
            proofs=[Proof("worker w1, pid 4711 outside", "gone after 3 ms", True)],
        )
    ]
    timeline.links = {f"host{i}": link_series(end_s) for i in range(3)}
    timeline.twin = {"state": "SUCCEEDED", "reason": "finished", "weights_sha256": "a" * 64}
    timeline.samples = {
        "num_expected": 400,
        "num_taken": 400,
        "num_missing": 0,
        "num_repeated": 0,
    }
    return timeline


def slowed() -> Timeline:
    """A run whose steps take four times as long while a link is slow."""
    timeline = undisturbed()
    before, during = steps(0, 1, 40, 4.0), steps(0, 41, 60, 6.0, 4 * STEP_S)
    after = steps(0, 61, NUM_STEPS, 10.0)
    timeline.steps = [*before, *during, *after]
    timeline.command_ended_at = START + 13.0
    timeline.faults = [
        FaultRecord(
            "slow_link",
            "slow_link",
            "link host1",
            host="host1",
            links=["host1"],
            begun_at=START + 6.01,
            ended_at=START + 9.95,
            lasts=True,
            proofs=[Proof("queue of host1", "tbf 400Mbit -> tbf 20Mbit", True)],
        )
    ]
    return timeline
