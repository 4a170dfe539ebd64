"""Draw the curve of a run from its spool: loss, restarts, speed. Needs no MLflow.

`python -m gangline.monitoring.report --spool DIR --out loss.png` draws in a process of its own, so
that a controller does not carry matplotlib (70 MiB) for the picture at the end.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gangline.monitoring.spool_reader import Record, SpoolReader

# Okabe and Ito's palette: distinguishable with any colour vision, and in print by lightness.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
# Beyond that many restarts lines and labels would hide the curve: short marks take their place.
MAX_LABELS = 8


class CurvePoint(NamedTuple):
    """A value at a step."""

    step: int
    value: float


@dataclass
class RunHistory:
    """What the picture needs; fill it by hand or with `from_spool`.

    `restarts` has the generation and the first step that it computed; `recomputed` the points of
    later generations at steps that an earlier one had computed already.
    """

    title: str = ""
    loss: list[CurvePoint] = field(default_factory=list)
    eval_loss: list[CurvePoint] = field(default_factory=list)
    tokens_per_s: list[CurvePoint] = field(default_factory=list)
    restarts: list[tuple[int, int]] = field(default_factory=list)
    recomputed: list[CurvePoint] = field(default_factory=list)
    num_lost_steps: int = 0

    @classmethod
    def from_spool(cls, spool_dir: Path) -> RunHistory:
        """Read the history of the job from its spool."""
        return cls.from_records(SpoolReader(spool_dir).records())

    @classmethod
    def from_records(cls, records: Iterable[Record]) -> RunHistory:
        """Build the history from the records of a spool, in order."""
        history = cls()
        generations: set[int] = set()
        for record in records:
            kind = record.get("type")
            run = record.get("run") if kind == "state" else record if kind == "run" else None
            if run:
                history.title = str(run["run_id"])
            elif kind == "metrics":
                history._add(record, generations)
        return history

    def _add(self, record: Record, generations: set[int]) -> None:
        values = {name: float(value) for name, value in record["values"].items()}
        step, generation = int(record["step"]), record["generation"]
        for_job = record["parent"]
        curves = {
            "train/loss": self.loss,
            "eval/loss": self.eval_loss,
            "train/tokens_per_s": self.tokens_per_s,
        }
        for name, curve in curves.items():
            if name in values:
                first_time = for_job is True or (for_job and name in for_job)
                if first_time:
                    curve.append(CurvePoint(step, values[name]))
                elif name == "train/loss":
                    self.recomputed.append(CurvePoint(step, values[name]))
        self.num_lost_steps += round(values.get("job/lost_steps", 0))
        if generation is not None and "train/loss" in values and generation not in generations:
            if generations:
                self.restarts.append((generation, step))
            generations.add(generation)


def draw_run(history: RunHistory, path: Path) -> None:
    """Write the picture of a run as PNG: loss above, tokens per second below.

    Raises: ValueError if there is no loss to draw.
    """
    if not history.loss:
        raise ValueError(
            f"run {history.title or '(no name)'} has no train/loss yet; wait for its first step"
        )
    # No pyplot: it keeps global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_speed = bool(history.tokens_per_s)
    figure = Figure(figsize=(9.0, 6.0 if has_speed else 4.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [3.0, 1.2] if has_speed else [1.0]
    axes: list[Any] = list(
        figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    )
    _draw_loss(axes[0], history)
    if has_speed:
        _draw_speed(axes[1], history)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    _mark_restarts(axes, history)
    # In a row above the curve, where it can hide nothing.
    axes[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=4)
    steps = [point.step for point in history.loss]
    margin = max((steps[-1] - steps[0]) * 0.01, 1.0)
    axes[0].set_xlim(min(steps) - margin, max(steps) + margin)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "gangline"})


def _draw_loss(axes: Any, history: RunHistory) -> None:
    loss = _finite(history.loss)
    marker = "o" if len(loss) < 3 else ""
    axes.plot(*_columns(loss), color=BLUE, linewidth=1.5, marker=marker, label="training", zorder=3)
    if history.eval_loss:
        curve = _finite(history.eval_loss)
        style = {"marker": "o", "markersize": 5, "linewidth": 1.2}
        axes.plot(*_columns(curve), color=ORANGE, label="validation", zorder=4, **style)
    if history.recomputed:
        curve = _finite(history.recomputed)
        label = f"computed again ({len(history.recomputed)} steps)"
        style = {"marker": ".", "markersize": 2.5, "linestyle": "none"}
        axes.plot(*_columns(curve), color=PURPLE, label=label, zorder=5, **style)
    num_bad = len(history.loss) - len(loss)
    axes.set_ylabel("loss (nat per token)")
    axes.set_title(_title(history, num_bad), loc="left", fontsize=11, pad=24)
    _tidy(axes)


def _draw_speed(axes: Any, history: RunHistory) -> None:
    speed = _finite(history.tokens_per_s)
    many = len(speed) > 50
    style = {"linewidth": 0.8, "alpha": 0.35 if many else 1.0, "marker": "" if many else "."}
    axes.plot(*_columns(speed), color=GREEN, **style)
    if many:
        smooth = _running_median(speed, max(len(speed) // 60, 5))
        axes.plot(*_columns(smooth), color=GREEN, linewidth=1.6, label="median")
    top = sorted(point.value for point in speed)[int(len(speed) * 0.99)] if speed else 1.0
    axes.set_ylim(0, top * 1.15 or 1.0)
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter(lambda value, _: _short_number(value))
    _tidy(axes)


def _mark_restarts(axes: Sequence[Any], history: RunHistory) -> None:
    if not history.restarts:
        return
    steps = [step for _, step in history.restarts]
    few = len(steps) <= MAX_LABELS
    for panel in axes:
        panel.vlines(
            steps,
            0,
            1 if few else 0.05,
            transform=panel.get_xaxis_transform(),
            color=GREY,
            linestyle=(0, (4, 3)) if few else "solid",
            linewidth=1.0,
            zorder=1 if few else 6,
            label="restart",
        )
    at_step: dict[int, list[str]] = {}
    for generation, step in history.restarts if few else ():
        at_step.setdefault(step, []).append(str(generation))
    for step, generations in at_step.items():
        # In the lowest panel, at the bottom: speed starts at zero there, so the place is free.
        axes[-1].annotate(
            f"attempt{'s' if len(generations) > 1 else ''} {', '.join(generations)}",
            (step, 0.04),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=8,
            color=GREY,
        )


def _title(history: RunHistory, num_bad: int) -> str:
    num_restarts = len(history.restarts)
    parts = [f"step {history.loss[-1].step}", f"loss {history.loss[-1].value:.3f}"]
    if num_restarts:
        parts.append(f"{num_restarts} restart{'s' if num_restarts > 1 else ''}")
    if history.num_lost_steps:
        parts.append(f"{history.num_lost_steps} steps lost")
    if num_bad:
        parts.append(f"{num_bad} not finite and not drawn")
    name = history.title or "run"
    return f"{name if len(name) <= 40 else name[:39] + '…'}   {', '.join(parts)}"


def _finite(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    return sorted(point for point in points if math.isfinite(point.value))


def _columns(points: Sequence[CurvePoint]) -> tuple[list[int], list[float]]:
    return [point.step for point in points], [point.value for point in points]


def _running_median(points: Sequence[CurvePoint], width: int) -> list[CurvePoint]:
    """Return the median of each window of `width` points, at the middle of the window."""
    windows = (points[start : start + width] for start in range(len(points) - width + 1))
    return [
        CurvePoint(window[width // 2].step, sorted(p.value for p in window)[width // 2])
        for window in windows
    ]


def _short_number(value: float) -> str:
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _tidy(axes: Any) -> None:
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main(arguments: Sequence[str]) -> int:
    """Draw the picture of one spool."""
    parser = argparse.ArgumentParser(description=__doc__, prog="gangline.monitoring.report")
    parser.add_argument("--spool", type=Path, required=True, help="folder of the spool")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args(arguments)
    try:
        draw_run(RunHistory.from_spool(options.spool), options.out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
