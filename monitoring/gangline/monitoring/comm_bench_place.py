"""Where a benchmark of collectives runs: its devices, library and memory."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import asdict

import psutil
import torch

from gangline.comm import collectives
from gangline.comm.mesh import Mesh
from gangline.comm.perf_case import AXIS
from gangline.monitoring.comm_bench_config import CommBenchConfig
from gangline.monitoring.comm_bench_table import Device

# Beside the two buffers and the expected values: what the backend holds of operations under way.
_SHARE_OF_MEMORY = 0.6
_NUM_BUFFERS = 3


def nccl_version(mesh: Mesh) -> int:
    """Return NCCL's version as nccl-tests prints it; 0 where it is not used."""
    if mesh.device.type != "cuda":
        return 0
    major, minor, patch = torch.cuda.nccl.version()[:3]
    return int(major * 10000 + minor * 100 + patch)


def library(config: CommBenchConfig, mesh: Mesh) -> str:
    """Say what really communicates."""
    backend = "nccl" if mesh.device.type == "cuda" else "gloo"
    return (
        f"torch.distributed backend={backend} implementation={config.implementation} "
        f"torch={torch.__version__}"
    )


def fit_to_memory(config: CommBenchConfig, mesh: Mesh) -> CommBenchConfig:
    """Lower the largest size, and the least if need be, until every rank has the memory.

    Communicates: a number.
    """
    hosts = mesh.axes[AXIS].hosts
    if mesh.device.type == "cuda":
        available = torch.cuda.mem_get_info(mesh.device)[0]
    else:
        available = psutil.virtual_memory().available // hosts.count(hosts[mesh.rank])
    room = int(available * _SHARE_OF_MEMORY) // _NUM_BUFFERS
    least = torch.tensor([min(config.max_bytes, room)])
    collectives.all_reduce(least, mesh, AXIS, op="min").wait()
    max_bytes = int(least.item())
    sizes = {"max_bytes": max_bytes, "min_bytes": min(config.min_bytes, max_bytes)}
    return config.model_copy(update=sizes)


def devices_of(mesh: Mesh) -> list[Device]:
    """Return where the ranks run, rank 0 first.

    Communicates: a line per rank.
    """
    on_cuda = mesh.device.type == "cuda"
    index = (mesh.device.index or 0) if on_cuda else 0
    name, hex_text = _processor_name(), "0000:00:00"
    if on_cuda:
        properties = torch.cuda.get_device_properties(mesh.device)
        name = properties.name
        places = [getattr(properties, f"pci_{n}_id", 0) for n in ("domain", "bus", "device")]
        hex_text = "{:04x}:{:02x}:{:02x}".format(*places)
    mine = Device(mesh.rank, 0, os.getpid(), socket.gethostname(), index, hex_text, name)
    return [Device(**fields) for fields in collectives.exchange_json(asdict(mine), mesh, AXIS)]


def _processor_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
