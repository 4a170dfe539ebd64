"""Draw a scenario's timeline: who was which rank where, the steps, the faults, the links.

    python -m gangline.orchestrator.timeline_plot timeline.json timeline.svg timeline.png

Four panels over one axis of seconds. *Events*: what the controller noted. *Hosts*: a bar for each
worker while it is a rank, with a tick per step, and a thin line while it is ready; a red box is a
fault on the host that it hit. *Step time*: each step, by generation. *Links*: what each carries.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gangline.orchestrator.timeline import FaultRecord, LinkSeries, Tenure, Timeline, load, tenures

# Okabe and Ito's palette: distinguishable with any colour vision, and in print by lightness.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#999999")
_GENERATION_COLORS = ("#444444", "#D55E00", "#117733", "#882255")  # ranks have the others
_FAULT, _READY, _TEXT, _GRID = "#D02020", "#DDDDDD", "#333333", "#E4E4E4"
# event -> (label, marker, colour); other events are not drawn.
_EVENTS = {
    "session_started": ("start", "|", _TEXT),
    "generation_started": ("generation", "^", "#009E73"),
    "failure": ("failure", "X", _FAULT),
    "decision": ("decision", "D", "#E69F00"),
    "recovered": ("running again", "o", "#0072B2"),
    "controller_restarted": ("controller again", "s", "#CC79A7"),
    "finished": ("end", "|", _TEXT),
}
_NUM_MAX_LINKS = 8
_LANE_HEIGHT_IN = 0.34
_NUM_MIN_BYTES = 100_000  # over less, the picture of links would be one of heartbeats


@dataclass(frozen=True)
class _Frame:
    """A timeline and the part of its time that is drawn, in seconds since the command."""

    timeline: Timeline
    first_s: float
    last_s: float

    @property
    def span_s(self) -> float:
        return self.last_s - self.first_s

    def s(self, instant: float) -> float:
        """Return an instant as seconds since the command."""
        return instant - self.timeline.command_started_at


def draw(timeline: Timeline, files: Sequence[Path]) -> None:
    """Write the picture to every file; the suffix says the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "gangline"  # the same timeline gives the same file
    from matplotlib import pyplot as plt

    frame, lanes = _frame_of(timeline), _lanes(timeline)
    num_lanes = sum(max(1, len(workers)) for workers in lanes.values())
    has_links = any(_carried(series) > _NUM_MIN_BYTES for series in timeline.links.values())
    heights = [0.75, max(1.0, num_lanes * _LANE_HEIGHT_IN), 1.5, *([1.7] if has_links else [])]
    figure, axes = plt.subplots(
        len(heights),
        1,
        sharex=True,
        figsize=(11, sum(heights) + 1.5),
        gridspec_kw={"height_ratios": heights, "hspace": 0.14},
    )
    _draw_title(figure, axes[0], timeline)
    _draw_events(axes[0], frame)
    _draw_hosts(axes[1], frame, lanes)
    _draw_steps(axes[2], frame)
    if has_links:
        _draw_links(axes[3], frame)
    _label_faults(axes[0], frame)
    for axis in axes:
        _shade_faults(axis, frame)
        axis.set_xlim(frame.first_s, frame.last_s)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.tick_params(labelsize=8, colors=_TEXT)
    axes[-1].set_xlabel("seconds since the command", fontsize=9)
    for file in files:
        figure.savefig(file, dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def _frame_of(timeline: Timeline) -> _Frame:
    """Choose what is drawn.

    Before the first generation nothing happens but the start of processes, of which little is
    shown.
    """
    origin = timeline.command_started_at
    last = max((event["time"] for event in timeline.events), default=0.0)
    last_s = max(1.0, last - origin, timeline.command_ended_at - origin)
    begun = timeline.events_of("generation_started")
    first_s = begun[0]["time"] - origin if begun else 0.0
    margin_s = 0.05 * (last_s - first_s)
    return _Frame(timeline, max(0.0, first_s - margin_s), last_s + 0.2 * margin_s)


def _lanes(timeline: Timeline) -> dict[str, list[str]]:
    """Return the rows of each host: its workers in the order in which they came."""
    rows: dict[str, list[str]] = {host: [] for host in timeline.hosts}
    for event in timeline.events_of("worker_ready"):
        rows.setdefault(event["info"]["host"], []).append(event["worker_id"])
    return rows


def _draw_title(figure: Any, top: Any, timeline: Timeline) -> None:
    verdict = (
        "as expected" if not timeline.failures else f"{len(timeline.failures)} not as expected"
    )
    wall_s = timeline.command_ended_at - timeline.command_started_at
    ended = timeline.state or "no state"
    if timeline.exit_code is None:
        ended = f"{ended}, ended at the deadline"
    place = top.get_position()
    figure.text(
        place.x0,
        place.y1 + 0.62 / figure.get_figheight(),
        f"{timeline.scenario}: {ended} in {wall_s:.1f} s, {verdict}",
        fontsize=11,
        color=_FAULT if timeline.failures else _TEXT,
    )


def _draw_events(axis: Any, frame: _Frame) -> None:
    shown: dict[str, Any] = {}
    last_at: dict[int, float] = {}
    for event in frame.timeline.events:
        at_s = frame.s(event["time"])
        if event["event"] not in _EVENTS or at_s < frame.first_s:
            continue
        label, marker, color = _EVENTS[event["event"]]
        # Events that come close together go to rows of their own.
        row = next(
            (r for r in range(4) if at_s - last_at.get(r, -math.inf) > 0.02 * frame.span_s), 3
        )
        last_at[row] = at_s
        handle = axis.scatter(at_s, -row, marker=marker, color=color, s=42, zorder=4, linewidth=1.4)
        shown.setdefault(label, handle)
    axis.set_ylim(-3.6, 0.6)
    axis.set_yticks([])
    axis.set_ylabel("events", rotation=0, ha="right", va="center", fontsize=9, color=_TEXT)
    axis.spines["left"].set_visible(False)
    axis.legend(
        shown.values(),
        shown.keys(),
        loc="lower left",
        bbox_to_anchor=(-0.012, 1.2),
        ncols=len(_EVENTS),
        fontsize=8,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.2,
    )


def _draw_hosts(axis: Any, frame: _Frame, lanes: dict[str, list[str]]) -> None:
    timeline, top = frame.timeline, 0
    middle: dict[str, float] = {}
    row_of: dict[str, int] = {}
    for host, workers in lanes.items():
        first = top
        for worker_id in workers or [""]:
            row_of[worker_id] = top
            top += 1
        middle[host] = (first + top - 1) / 2
        if first:
            axis.axhline(first - 0.5, color=_GRID, linewidth=0.8, zorder=0)
        for fault in timeline.faults:
            if host == fault.host:
                _draw_fault(axis, fault, frame, first, top)
    ended = {event["worker_id"]: event["time"] for event in timeline.events_of("worker_ended")}
    for event in timeline.events_of("worker_ready"):
        begin, worker_id = event["time"], event["worker_id"]
        width_s = ended.get(worker_id, timeline.command_ended_at) - begin
        axis.barh(row_of[worker_id], width_s, left=frame.s(begin), height=0.2, color=_READY)
    for tenure in tenures(timeline):
        if tenure.worker_id in row_of:
            _draw_tenure(axis, tenure, frame, row_of[tenure.worker_id])
    axis.set_ylim(top - 0.4, -0.6)
    axis.set_yticks(list(middle.values()), list(middle))
    axis.tick_params(axis="y", length=0)


def _draw_tenure(axis: Any, tenure: Tenure, frame: _Frame, row: int) -> None:
    color = _COLORS[tenure.rank % len(_COLORS)]
    begin_s, width_s = frame.s(tenure.begin), max(0.02, tenure.end - tenure.begin)
    axis.barh(row, width_s, left=begin_s, height=0.62, color=color, alpha=0.85, zorder=2)
    mine = [step for step in frame.timeline.steps if step["generation"] == tenure.generation]
    ticks_s = [frame.s(step["time"]) for step in mine]
    axis.vlines(ticks_s, row + 0.12, row + 0.31, color="white", linewidth=0.6, zorder=3)
    texts = (f"rank {tenure.rank}, generation {tenure.generation}", f"{tenure.rank}")
    shares = (0.16, 0.015)  # of the picture's width that each needs
    fit = [t for t, share in zip(texts, shares, strict=True) if width_s > share * frame.span_s]
    if fit:
        axis.annotate(
            fit[0], (begin_s, row), xytext=(3, 2), textcoords="offset points",
            fontsize=7, va="center", color="black", zorder=5,
        )  # fmt: skip


def _draw_fault(axis: Any, fault: FaultRecord, frame: _Frame, first: int, top: int) -> None:
    if fault.begun_at is None:
        return
    width_s = max(0.03, frame.timeline.end_of(fault) - fault.begun_at) if fault.lasts else 0.03
    axis.barh(
        (first + top - 1) / 2,
        width_s,
        left=frame.s(fault.begun_at),
        height=top - first - 0.06,
        facecolor="none" if fault.is_left_out else f"{_FAULT}22",
        edgecolor=_FAULT,
        linewidth=1.2,
        linestyle=":" if fault.is_left_out else "-",
        zorder=4,
    )


def _shade_faults(axis: Any, frame: _Frame) -> None:
    for fault in frame.timeline.faults:
        if fault.begun_at is None:
            continue
        begin_s = frame.s(fault.begun_at)
        if fault.lasts:
            end_s = frame.s(frame.timeline.end_of(fault))
            axis.axvspan(begin_s, end_s, color=_FAULT, alpha=0.08, zorder=0, linewidth=0)
        axis.axvline(begin_s, color=_FAULT, linewidth=1, linestyle=(0, (4, 2)), zorder=1)


def _label_faults(axis: Any, frame: _Frame) -> None:
    last_s, level = -math.inf, 0
    for fault in frame.timeline.faults:
        if fault.begun_at is None:
            continue
        begin_s = frame.s(fault.begun_at)
        level = level + 1 if begin_s - last_s < 0.3 * frame.span_s else 0
        last_s = begin_s
        left_out = " (left out)" if fault.is_left_out else ""
        is_late = begin_s > frame.first_s + 0.7 * frame.span_s
        axis.annotate(
            f"{fault.label}{left_out}: {fault.target}",
            (begin_s, 1.04 - 0.24 * level),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if is_late else 0, 0),
            textcoords="offset points",
            ha="right" if is_late else "left",
            fontsize=8,
            color=_FAULT,
            zorder=6,
        )


def _draw_steps(axis: Any, frame: _Frame) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    timeline = frame.timeline
    for generation in sorted({step["generation"] for step in timeline.steps}):
        steps = [step for step in timeline.steps if step["generation"] == generation]
        axis.plot(
            [frame.s(step["time"]) for step in steps],
            [step["step_s"] * 1e3 for step in steps],
            ".",
            markersize=3,
            color=_GENERATION_COLORS[generation % len(_GENERATION_COLORS)],
            label=f"generation {generation}",
        )
    if timeline.steps:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        low = axis.get_ylim()[0]
        failed_s = [frame.s(c["time"]) for c in timeline.checkpoints if c["status"] == "failed"]
        if failed_s:
            axis.plot(failed_s, [low] * len(failed_s), "x", color=_FAULT, label="failed checkpoint")
        axis.legend(fontsize=7, frameon=False, ncols=4, loc="upper left")
    axis.set_ylabel("step time, ms", fontsize=9, color=_TEXT)
    axis.grid(axis="y", color=_GRID, linewidth=0.6)


def _draw_links(axis: Any, frame: _Frame) -> None:
    links = frame.timeline.links
    chosen = sorted(links, key=lambda name: (*_interest(name, frame.timeline), name))
    for number, name in enumerate(sorted(chosen[:_NUM_MAX_LINKS])):
        for counts, style in ((links[name].egress_bytes, "-"), (links[name].ingress_bytes, ":")):
            times, rates_mbit = _rates(links[name], counts)
            label = name if style == "-" else None
            color = _COLORS[number % len(_COLORS)]
            axis.plot(
                [frame.s(t) for t in times], rates_mbit, style, color=color, lw=1, label=label
            )
    axis.set_ylabel("Mbit/s", fontsize=9, color=_TEXT)
    axis.set_ylim(0, 1.35 * axis.get_ylim()[1])  # the legend stands above the lines
    axis.grid(axis="y", color=_GRID, linewidth=0.6)
    axis.legend(
        fontsize=7,
        frameon=False,
        ncols=min(4, len(chosen)),
        loc="upper left",
        title="links: sent by the first end (solid), by the second (dotted)",
        title_fontsize=7,
        alignment="left",
    )


def _interest(name: str, timeline: Timeline) -> tuple[bool, int]:
    """Order links: those that a fault hits first, then those that carried most."""
    is_hit = any(name in fault.links for fault in timeline.faults)
    return (not is_hit, -_carried(timeline.links[name]))


def _carried(series: LinkSeries) -> int:
    return sum(counts[-1] for counts in (series.egress_bytes, series.ingress_bytes) if counts)


def _rates(series: LinkSeries, counts: Sequence[int]) -> tuple[list[float], list[float]]:
    """Return at which instants which rate, in Mbit/s, was read from the counters."""
    times, rates_mbit = [], []
    for index in range(1, len(counts)):
        elapsed_s = series.times[index] - series.times[index - 1]
        if elapsed_s > 0:
            times.append(series.times[index])
            rates_mbit.append((counts[index] - counts[index - 1]) * 8e-6 / elapsed_s)
    return times, rates_mbit


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the timeline of a JSON file into the given pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("timeline", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    draw(load(options.timeline), options.pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
