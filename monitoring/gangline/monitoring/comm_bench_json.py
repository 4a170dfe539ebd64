"""The JSON that nccl-tests writes with -J, schema version 3: the same keys, types and spelling.

Truth values are the texts "true" and "false", the root is padded text, a number that is none is
"nan", and what was not checked is null. Numbers have six decimals.

Of the environment only what steers the communication is written, without secrets: nccl-tests
itself writes all of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gangline.monitoring.comm_bench_config import CommBenchConfig
from gangline.monitoring.comm_bench_table import (
    Block,
    Device,
    IterationStats,
    is_fast_enough,
    root_text,
)
from gangline.monitoring.redaction import MASK, redact_userinfo

Json = dict[str, Any]

SCHEMA_VERSION = 3
_NAMES_KEPT = re.compile(
    r"(?:NCCL|TORCH_NCCL|GLOO|TORCH_GLOO|UCX|FI)_[A-Z0-9_]+|CUDA_VISIBLE_DEVICES"
)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH", re.IGNORECASE)


def visible_environment(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that a report may show, as NAME=value, secrets masked."""
    shown = []
    for name in sorted(environment):
        if _NAMES_KEPT.fullmatch(name) is None:
            continue
        is_secret = _SECRET_NAME.search(name) is not None
        shown.append(f"{name}={MASK if is_secret else redact_userinfo(environment[name])}")
    return shown


def config_json(config: CommBenchConfig, devices: Sequence[Device]) -> Json:
    """Return the object `config`."""
    step = (
        {"step_factor": config.step_factor}
        if config.step_factor > 1
        else {"step_bytes": config.step_bytes}
    )
    return {
        "nthreads": 1,
        "ngpus": 1,
        "minimum_bytes": config.min_bytes,
        "maximum_bytes": config.max_bytes,
        **step,
        "warmup_iters": config.warmup_iters,
        "iterations": config.iters,
        "aggregated_iterations": config.agg_iters,
        "validation": config.checks,
        "graph": config.cudagraph,
        "blocking_collectives": _truth(config.blocking > 0),
        "per_iter_timing": _truth(config.per_iter_timing),
        "per_iter_skip": config.per_iter_skip,
        "parallel_init": _truth(config.parallel_init),
        "devices": [asdict(device) for device in devices],
    }


def result_json(
    *,
    size_bytes: int,
    count: int,
    type_name: str,
    redop: str,
    root: int,
    blocks: Sequence[Block],
    iter_s: Sequence[Sequence[Sequence[float]]],
    config: CommBenchConfig,
) -> Json:
    """Return one object of `results`; `iter_s[block][rank][iteration]` may be empty."""
    result: Json = {
        "size": size_bytes,
        "count": count,
        "type": type_name,
        "redop": redop,
        "root": root_text(root),
    }
    time_key = "cpu_time" if config.report_cputime else "time"
    for name, block, rows in zip(("out_of_place", "in_place"), blocks, iter_s, strict=True):
        result[name] = {
            time_key: _number(block.time_us),
            "alg_bw": _number(block.algbw_gbs),
            "bus_bw": _number(block.busbw_gbs),
            "nwrong": None if block.num_wrong is None else _number(float(block.num_wrong)),
        }
        if block.per_iteration is not None:
            result[f"{name}_per_iter"] = _per_iteration(
                block.per_iteration, rows, config.per_iter_skip
            )
    return {**result, "actual_iterations": config.iters, "experiment_name": ""}


def _per_iteration(stats: IterationStats, rows: Sequence[Sequence[float]], skipped: int) -> Json:
    rows_us = [[_number(seconds * 1e6) for seconds in row] for row in rows]
    found = {
        "skipped_iterations": skipped,
        "min_us": _number(stats.min_us),
        "max_us": _number(stats.max_us),
        "avg_us": _number(stats.avg_us),
        "p50_us": _number(stats.p50_us),
        "p95_us": _number(stats.p95_us),
        "p99_us": _number(stats.p99_us),
        "stdev_us": _number(stats.stdev_us),
        "cv_pct": _number(stats.cv_percent),
        "times_us": [_number(seconds * 1e6) for seconds in slowest(rows)],
    }
    return found | ({"per_process_max_times_us": rows_us} if len(rows) > 1 else {})


def slowest(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the time of each iteration on the rank that took the longest."""
    return [max(times) for times in zip(*rows, strict=True)]


def document(
    *,
    start_time: str,
    end_time: str,
    args: Sequence[str],
    environment: Mapping[str, str],
    nccl_version: int,
    config: Json,
    results: Sequence[Json],
    num_failed: int,
    busbw_gbs: float,
    min_busbw_gbs: float | None,
    errors: Sequence[str] = (),
) -> Json:
    """Return the whole report of one operation."""
    is_okay = "unchecked"
    if min_busbw_gbs is not None:
        is_okay = _truth(is_fast_enough(busbw_gbs, min_busbw_gbs))
    return {
        "version": SCHEMA_VERSION,
        "start_time": start_time,
        "args": list(args),
        "env": visible_environment(environment),
        "nccl_version": nccl_version,
        "config": config,
        "results": list(results),
        "out_of_bounds": {"count": num_failed, "okay": _truth(num_failed == 0)},
        "average_bus_bandwidth": {"bandwidth": _number(busbw_gbs), "okay": is_okay},
        "errors": list(errors),
        "end_time": end_time,
    }


def _truth(value: bool) -> str:
    return "true" if value else "false"


def _number(value: float) -> float | str:
    return "nan" if math.isnan(value) else round(value, 6)
