"""What each rank does in the tests of the benchmark's report; run by rank_server.py."""

from __future__ import annotations

import json
from typing import Any

import torch

from gangline.comm import perf_ops
from gangline.comm.handle import Handle
from gangline.comm.mesh import Mesh
from gangline.comm.perf_case import Case
from gangline.monitoring.comm_bench import Surroundings, UnsupportedError, run_operation
from gangline.monitoring.comm_bench_config import CommBenchConfig

ENVIRONMENT = {
    "HOME": "/root",
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "NCCL_DEBUG": "WARN",
    "NCCL_AUTH_TOKEN": "hunter2",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_CONF_URI": "https://me:hunter2@host/x",
}


class Sink:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.results: list[dict[str, Any]] = []

    def text(self, text: str) -> None:
        self.texts.append(text)

    def result(self, result: dict[str, Any]) -> None:
        self.results.append(result)


def report(
    mesh: Mesh, operations: list[str], config: dict[str, Any], stop_after: int | None = None
) -> dict[str, Any]:
    """Run the benchmark; return rank 0's text and JSON, and what every rank was told."""
    settings = CommBenchConfig.model_validate_json(json.dumps(config))
    sink = Sink() if mesh.rank == 0 else None
    num_ops = 0

    def count() -> None:
        nonlocal num_ops
        num_ops += 1

    reports = [
        run_operation(
            operation,
            settings,
            mesh,
            sink=sink,
            surroundings=Surroundings("9.9.9", ENVIRONMENT),
            on_progress=count,
            # Only the last rank wants to stop: all must.
            should_stop=lambda: (
                stop_after is not None and mesh.rank == mesh.world_size - 1 and num_ops > stop_after
            ),
        )
        for operation in operations
    ]
    return {
        "text": "".join(sink.texts) if sink else "",
        "documents": [report.json for report in reports] if sink else [],
        "rows": sink.results if sink else [],
        "ok": [report.is_ok for report in reports],
        "stopped": [report.was_stopped for report in reports],
        "sentences": [report.sentence(settings.min_busbw_gbs) for report in reports],
        "num_ops": num_ops,
    }


def report_with_a_liar(mesh: Mesh, config: dict[str, Any]) -> dict[str, Any]:
    """The same, with a rank whose results are wrong in two elements."""
    honest = perf_ops.start

    def lie(case: Case, send: torch.Tensor, recv: torch.Tensor, mesh: Mesh) -> Handle:
        handle = honest(case, send, recv, mesh)
        if mesh.rank == 1:
            handle.wait()
            recv[-2:] += 1
        return handle

    perf_ops.start = lie
    try:
        return report(mesh, ["all_reduce"], config)
    finally:
        perf_ops.start = honest


def refuse(mesh: Mesh, config: dict[str, Any]) -> str:
    """Ask for what the backend cannot do; return what every rank is told."""
    try:
        report(mesh, ["all_reduce"], config)
    except UnsupportedError as error:
        return str(error)
    return "it can"
