"""Whether a job's workers fit a cluster, and if not, what to change."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gangline.orchestrator.errors import InfeasibleError
from gangline.orchestrator.job_models import WorkersConfig


class PlanError(InfeasibleError):
    """Say that a job can never start: what it needs, what there is, and the mend."""


@dataclass(frozen=True, slots=True)
class NodeResources:
    """What one node has in all; `memory_bytes` None where it is not known."""

    num_cpus: float
    num_gpus: float = 0.0
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """What a cluster has in all, used or not."""

    nodes: tuple[NodeResources, ...]


def cluster_of(nodes: Sequence[Mapping[str, float]]) -> ClusterResources:
    """Translate what Ray says that its nodes have in all."""
    return ClusterResources(
        tuple(
            NodeResources(
                num_cpus=node.get("CPU", 0.0),
                num_gpus=node.get("GPU", 0.0),
                memory_bytes=int(node["memory"]) if "memory" in node else None,
            )
            for node in nodes
        )
    )


def check_fits(workers: WorkersConfig, cluster: ClusterResources) -> None:
    """Check that a cluster could hold all workers and spares, if nothing else ran on it.

    Raises: PlanError that says what is needed, what there is and what to change.
    """
    num_wanted = workers.count + workers.spares
    num_fit = sum(_num_on_node(workers, node) for node in cluster.nodes)
    if num_fit >= num_wanted:
        return
    nodes = cluster.nodes
    cpus, gpus = sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes)
    has = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} with {cpus:g} CPUs"
    has += f" and {gpus:g} GPUs" if workers.gpus or gpus else ""
    if num_fit > workers.count:
        mend = f"set workers.spares to {num_fit - workers.count}"
    elif num_fit == workers.count:
        mend = "set workers.spares to 0"
    elif num_fit > 0:
        mend = f"set workers.count to {num_fit} and workers.spares to 0"
    else:
        mend = f"lower {_too_much(workers, nodes)}"
    raise PlanError(
        f"the job needs {num_wanted} workers ({workers.count} + {workers.spares} spares) of "
        f"{resources_text(workers)}; the cluster has {has}, enough for {num_fit}; {mend} or add "
        "nodes"
    )


def _num_on_node(workers: WorkersConfig, node: NodeResources) -> int:
    # Ray counts in ten-thousandths: a tenth of a CPU ten times over is one CPU.
    limits = [math.floor(node.num_cpus / workers.cpus + 1e-4)]
    if workers.gpus:
        limits.append(math.floor(node.num_gpus / workers.gpus + 1e-4))
    if workers.memory_bytes and node.memory_bytes is not None:
        limits.append(node.memory_bytes // workers.memory_bytes)
    return min(limits)


def _too_much(workers: WorkersConfig, nodes: Sequence[NodeResources]) -> str:
    """Name the field of which no node has enough for a single worker."""
    if not any(node.num_cpus >= workers.cpus for node in nodes):
        return "workers.cpus"
    if workers.gpus and not any(node.num_gpus >= workers.gpus for node in nodes):
        return "workers.gpus"
    return "workers.memory_bytes" if workers.memory_bytes else "workers.cpus"


def resources_text(workers: WorkersConfig) -> str:
    """Write what one worker may use."""
    parts = [f"{workers.cpus:g} CPU"]
    if workers.gpus:
        parts.append(f"{workers.gpus} GPU")
    if workers.memory_bytes:
        parts.append(bytes_text(workers.memory_bytes))
    return ", ".join(parts)


def bytes_text(num_bytes: float) -> str:
    """Write a number of bytes in the largest binary unit below it."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:,.1f} {unit}"


def count_text(count: float) -> str:
    """Write a large count with a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 1000 or prefix == "P":
            break
        count /= 1000
    return f"{count:.0f} " if not prefix else f"{count:,.2f} {prefix}"
