"""Faults of links: slow, black, down, flapping; and of spines, all the links of one switch."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Literal

from gangline.orchestrator.faults import (
    Blackhole,
    FlappingLink,
    LinkDown,
    SlowLink,
    SpineBlack,
    SpineDown,
)
from gangline.orchestrator.faults_stage import Aim, Begun, Stage
from gangline.orchestrator.lab_links import End, Link
from gangline.orchestrator.timeline import Proof

# What the ends of a link call a direction.
_DIRECTIONS: dict[str, Literal["both", "a_to_b", "b_to_a"]] = {
    "both": "both",
    "egress": "a_to_b",
    "ingress": "b_to_a",
}
# What may come through after a link has gone black: packets that were on their way.
_MAX_LATE_BYTES = 256 * 1024
# A token bucket lets a burst pass before it limits.
_MAX_OVER_RATE = 1.1
_MAX_BURST_BYTES = 2 * 1024 * 1024


def slow_link(fault: SlowLink, aim: Aim, stage: Stage) -> Begun:
    """Limit the rate of a link."""
    (link,) = aim.links
    before, bytes_before = _queues(stage, link), _arrived(link)
    link.set_rate(fault.rate_mbit, _DIRECTIONS[fault.direction])
    at = time.time()
    proofs = _queue_proofs(stage, link, fault.direction, before)

    def restore() -> list[Proof]:
        elapsed_s = time.time() - at
        allowed = fault.rate_mbit * 1e6 / 8 * elapsed_s * _MAX_OVER_RATE + _MAX_BURST_BYTES
        bytes_after = _arrived(link)
        proofs = []
        for where, index in _meant(fault.direction, link):
            carried = bytes_after[index] - bytes_before[index]
            found = f"{carried} B in {elapsed_s:.1f} s, {carried * 8e-6 / elapsed_s:.1f} Mbit/s"
            proofs.append(Proof(f"carried from {where}", found, carried <= allowed))
        link.set_rate(link.rate_mbit, _DIRECTIONS[fault.direction])
        after = _queues(stage, link)
        return [*proofs, Proof("queues again", ", ".join(after), after == before)]

    return Begun(at, proofs, restore)


def blackhole(fault: Blackhole, aim: Aim, stage: Stage) -> Begun:
    """Drop what a link carries in one direction or both."""
    return _black(stage, aim.links, fault.direction)


def spine_black(fault: SpineBlack, aim: Aim, stage: Stage) -> Begun:
    """Drop what all links of a spine carry; the leaves see nothing of it."""
    del fault
    return _black(stage, aim.links, "both")


def link_down(fault: LinkDown, aim: Aim, stage: Stage) -> Begun:
    """Take the carrier of a link away."""
    del fault
    return _down(stage, aim.links)


def spine_down(fault: SpineDown, aim: Aim, stage: Stage) -> Begun:
    """Take the carrier of every link of a spine away."""
    del fault
    return _down(stage, aim.links)


def flapping_link(fault: FlappingLink, aim: Aim, stage: Stage) -> Begun:
    """Take a link down and up again and again, in a thread of its own."""
    (link,) = aim.links
    stop = threading.Event()
    seen: list[str] = []

    def flap() -> None:
        while True:
            link.set_carrier(False)
            seen.append(_carriers(stage, [link]))
            stop.wait(fault.down_s)
            link.set_carrier(True)
            if stop.wait(fault.up_s):
                return

    at = time.time()
    thread = threading.Thread(target=flap, name=f"flapping {link.name}", daemon=True)
    thread.start()

    def steady() -> list[Proof]:
        stop.set()
        thread.join()
        num_down = sum("UP" not in carriers for carriers in seen)
        after = _carriers(stage, [link])
        return [
            Proof("times down", f"{num_down} of {len(seen)} seen", num_down == len(seen) > 1),
            Proof("carriers again", after, "DOWN" not in after),
        ]

    return Begun(at, [], steady)


def _black(stage: Stage, links: Sequence[Link], direction: str) -> Begun:
    queues = [_queues(stage, link) for link in links]
    for link in links:
        link.blackhole(_DIRECTIONS[direction])
    at = time.time()
    arrived = [_arrived(link) for link in links]
    proofs = [
        proof
        for link, before in zip(links, queues, strict=True)
        for proof in _queue_proofs(stage, link, direction, before)
    ]

    def heal() -> list[Proof]:
        proofs = []
        for link, before in zip(links, arrived, strict=True):
            after = _arrived(link)
            for where, index in _meant(direction, link):
                found = f"{after[index] - before[index]} B in {time.time() - at:.1f} s"
                holds = after[index] - before[index] <= _MAX_LATE_BYTES
                proofs.append(Proof(f"arrived from {where}", found, holds))
            carriers = _carriers(stage, [link])
            proofs.append(Proof(f"carriers of {link.name}", carriers, "DOWN" not in carriers))
            link.heal()
        return proofs

    return Begun(at, proofs, heal)


def _queue_proofs(stage: Stage, link: Link, direction: str, before: tuple[str, str]) -> list[Proof]:
    now = _queues(stage, link)
    return [
        Proof(f"queue of {where}", f"{before[index]} -> {now[index]}", before[index] != now[index])
        for where, index in _meant(direction, link)
    ]


def _down(stage: Stage, links: Sequence[Link]) -> Begun:
    for link in links:
        link.set_carrier(False)
    at = time.time()
    during = _carriers(stage, links)

    def up() -> list[Proof]:
        for link in links:
            link.set_carrier(True)
        after = _carriers(stage, links)
        return [Proof("carriers again", after, "DOWN" not in after)]

    proofs = [Proof("carriers", during, "UP" not in during)]
    return Begun(at, proofs, up)


def _meant(direction: str, link: Link) -> list[tuple[str, int]]:
    """Return (where it is sent, 0 for a or 1 for b) for the directions that are meant."""
    indexes = {"egress": (0,), "ingress": (1,), "both": (0, 1)}[direction]
    names = (link.a.network.name, link.b.network.name)
    return [(names[index], index) for index in indexes]


def _queues(stage: Stage, link: Link) -> tuple[str, str]:
    """Say what stands at a and at b in front of the wire: `tbf 100Mbit`, `blackhole`."""
    return (_queue(stage, link.a), _queue(stage, link.b))


def _queue(stage: Stage, end: End) -> str:
    words = stage.lab.net(end.network, "tc", "qdisc", "show", "dev", end.interface).split()
    kind = words[1] if len(words) > 1 else "none"
    return f"{kind} {words[words.index('rate') + 1]}" if "rate" in words else kind


def _arrived(link: Link) -> tuple[int, int]:
    """Return the bytes that have arrived so far from a, and from b."""
    found = link.num_bytes()
    return (found.a_to_b, found.b_to_a)


def _carriers(stage: Stage, links: Sequence[Link]) -> str:
    """Say whether the ends of links have a carrier: `host0:eth0 UP, star:h0 UP`."""
    found = []
    for link in links:
        for end in (link.a, link.b):
            text = stage.lab.net(end.network, "ip", "-j", "link", "show", "dev", end.interface)
            state = "UP" if "LOWER_UP" in json.loads(text)[0]["flags"] else "DOWN"
            found.append(f"{end.network.name}:{end.interface} {state}")
    return ", ".join(found)
