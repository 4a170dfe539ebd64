"""The text that nccl-tests prints, character for character: header, one row per size, footer.

A parser written for nccl-tests reads it. The lines that say that this is not NVIDIA's binary are
comments, as all lines that begin with `#`.

Source: the output of NVIDIA nccl-tests 2.19.6, written anew. Its `root` column is padded to six
characters, its numbers take the first of two, one and no decimals that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gangline.monitoring.comm_bench_config import CommBenchConfig

FORMAT_VERSION = "2.19.6"
TIMESTAMP_FORMAT = "%Y-%m-%d %H:%M:%S"
_TIMESTAMP_WIDTH = 19


@dataclass(frozen=True)
class Device:
    """Where a rank runs."""

    rank: int
    group: int
    pid: int
    hostname: str
    device: int
    device_hex: str
    device_info: str


@dataclass(frozen=True)
class IterationStats:
    """The spread of an operation's single iterations, in microseconds."""

    min_us: float
    max_us: float
    avg_us: float
    p50_us: float
    p95_us: float
    p99_us: float
    stdev_us: float

    @property
    def cv_percent(self) -> float:
        """Return the standard deviation over the mean."""
        return self.stdev_us / self.avg_us * 100 if self.avg_us > 0 else 0.0


@dataclass(frozen=True)
class Block:
    """The out-of-place or the in-place half of a row; `num_wrong` None prints N/A."""

    time_us: float
    algbw_gbs: float
    busbw_gbs: float
    num_wrong: int | None
    per_iteration: IterationStats | None = None


def header(
    config: CommBenchConfig,
    operation: str,
    devices: Sequence[Device],
    *,
    runs_on: str,
    nccl_version: int,
    was_reduced: bool = False,
) -> str:
    """Return the lines before the table. `runs_on` says what really ran.

    `was_reduced` tells that the largest size was lowered for want of memory.
    """
    stepping = (
        f"{config.step_factor}(factor)" if config.step_factor > 1 else f"{config.step_bytes}(bytes)"
    )
    lines = [
        f"# nccl-tests version {FORMAT_VERSION} nccl-headers={nccl_version} "
        f"nccl-library={nccl_version}",
        f"# Collective test starting: {operation}_perf",
        f"# nThread 1 nGpus 1 minBytes {config.min_bytes} maxBytes {config.max_bytes} "
        f"step: {stepping} warmup iters: {config.warmup_iters} iters: {config.iters} "
        f"agg iters: {config.agg_iters} validation: {config.checks} graph: {config.cudagraph} "
        f"unalign: {config.unalign}",
        *_mode_lines(config),
        f"# {runs_on}",
        "#",
        "# Using devices",
    ]
    lines += [
        f"#  Rank {d.rank:2d} Group {d.group:2d} Pid {d.pid:6d} on {d.hostname:>10} device "
        f"{d.device:2d} [{d.device_hex}] {d.device_info}"
        for d in devices
    ]
    if was_reduced:
        lines += ["#", f"# Reducing maxBytes to {config.max_bytes} due to memory limitation"]
    return _joined(lines)


def _mode_lines(config: CommBenchConfig) -> list[str]:
    lines = [
        {
            0: "",
            1: "# Blocking Enabled: wait and barrier after each inner iteration (-m) ",
            2: "# Blocking Enabled: wait after each inner iteration (-m), no barrier ",
            3: "# Blocking Enabled: wait and barrier after each outer iteration (-n); "
            "time excludes barrier ",
        }[config.blocking]
    ]
    if config.per_iter_timing:
        skipped = (
            f"; summary skips first {config.per_iter_skip} iterations"
            if config.per_iter_skip
            else ""
        )
        lines.append(f"# Per-Iteration Report: i_* uses max over process rows{skipped} ")
    if config.parallel_init:
        lines.append("# Parallel Init Enabled: one process per rank ")
    return [line for line in lines if line]


def columns(config: CommBenchConfig) -> str:
    """Return the three lines above the first row."""
    time_name = "cputime" if config.report_cputime else "time"
    stamp = ("timestamp", TIMESTAMP_FORMAT) if config.report_timestamps else ("", "")
    width = _TIMESTAMP_WIDTH if config.report_timestamps else 0
    names = [f"{time_name:>7}", f"{'algbw':>6}", f"{'busbw':>6}", f"{'#wrong':>6}"]
    units = [f"{'(us)':>7}", f"{'(GB/s)':>6}", f"{'(GB/s)':>6}", f"{'':>6}"]
    titles = "           out-of-place                       in-place          "
    if config.per_iter_timing:
        names += [f"{name:>7}" for name in ("i_min", "i_max", "i_p99", "i_cv%")]
        units += [f"{unit:>7}" for unit in ("(us)", "(us)", "(us)", "(%)")]
        titles = (
            "              out-of-place (+ per-iteration)"
            "                                in-place (+ per-iteration)"
        )
    left = "# {:>10}  {:>12}  {:>8}  {:>6}  {:>6}"
    return _joined(
        [
            "#",
            left.format("", "", "", "", "") + titles,
            "  ".join([left.format("size", "count", "type", "redop", "root"), *names, *names])
            + f" {stamp[0]:>{width}}",
            "  ".join([left.format("(B)", "(elements)", "", "", ""), *units, *units])
            + f" {stamp[1]:>{width}}",
        ]
    )


def row(
    *,
    size_bytes: int,
    count: int,
    type_name: str,
    redop: str,
    root: int,
    blocks: Sequence[Block],
    timestamp: str = "",
) -> str:
    """Return one row: its preamble and its two blocks."""
    text = f"{size_bytes:12d}  {count:12d}  {type_name:>8}  {redop:>6}  {root_text(root):>6}"
    for block in blocks:
        text += (
            f"  {number(block.time_us, 7):>7}  {number(block.algbw_gbs, 6):>6}  "
            f"{number(block.busbw_gbs, 6):>6}"
        )
        text += "    N/A" if block.num_wrong is None else f"  {float(block.num_wrong):6g}"
        if block.per_iteration is not None:
            stats = block.per_iteration
            for value in (stats.min_us, stats.max_us, stats.p99_us, stats.cv_percent):
                text += f"  {number(value, 7):>7}"
    return _joined([text + (f"{timestamp:>21}" if timestamp else "")])


def footer(
    operation: str, *, num_failed: int, busbw_gbs: float, min_busbw_gbs: float | None
) -> str:
    """Return the lines after the last row.

    `num_failed` counts the measurements with wrong values, per rank.
    """
    verdict = ""
    if min_busbw_gbs is not None:
        verdict = "OK" if is_fast_enough(busbw_gbs, min_busbw_gbs) else "FAILED"
    return _joined(
        [
            f"# {'Out of bounds values':<20} : {num_failed} {'FAILED' if num_failed else 'OK'}",
            f"# {'Avg bus bandwidth':<20} : {busbw_gbs:g} {verdict}",
            "#",
            f"# Collective test concluded: {operation}_perf",
            "#",
            "",
        ]
    )


def is_fast_enough(busbw_gbs: float, min_busbw_gbs: float | None) -> bool:
    """Return whether nine tenths of the wanted bandwidth are reached."""
    return min_busbw_gbs is None or busbw_gbs >= min_busbw_gbs * 0.9


def number(value: float, width: int) -> str:
    """Return a number with as many of two decimals as fit, else in powers of ten."""
    for decimals in (2, 1, 0):
        text = f"{value:.{decimals}f}"
        if len(text) <= width:
            return text
    return f"{value:.1e}" if width >= 7 else f"{value:.0e}"


def root_text(root: int) -> str:
    """Return the root as table and JSON have it: padded to six characters."""
    return f"{root:6d}"


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
