"""Sample the load of this node: processor, memory, disk, network, processes, GPUs.

A sample is a plain dict with the names of the table in `gangline.monitoring.metrics`, ready for
`Tracker.log_metrics`. Nothing here talks to the network or keeps a thread; whoever wants a sample
every ten seconds calls every ten seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from gangline.monitoring.metrics import segment


@dataclass(frozen=True)
class GpuSample:
    """What one GPU does at the moment; None where the driver does not say."""

    utilization_percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    power_w: float | None
    temperature_c: float | None


class GpuReader(Protocol):
    """Reads the GPUs of this node."""

    def read(self) -> Sequence[GpuSample]:
        """Return one sample per GPU, in the driver's order."""


class NoGpus:
    """The reader of a node without GPUs."""

    def read(self) -> Sequence[GpuSample]:
        """Return nothing."""
        return ()


class NvmlGpus:
    """The reader of NVIDIA's management library.

    Raises: `pynvml.NVMLError` if there is no driver; see `gpu_reader`.
    """

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]

    def read(self) -> Sequence[GpuSample]:
        """Return one sample per GPU; a field that a GPU does not support is None."""
        return [self._read_one(handle) for handle in self._handles]

    def _read_one(self, handle: object) -> GpuSample:
        nvml = self._nvml
        utilization = memory = power_mw = temperature = None
        with contextlib.suppress(nvml.NVMLError):
            utilization = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        with contextlib.suppress(nvml.NVMLError):
            power_mw = float(nvml.nvmlDeviceGetPowerUsage(handle))
        with contextlib.suppress(nvml.NVMLError):
            temperature = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        return GpuSample(
            utilization_percent=utilization,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_w=None if power_mw is None else power_mw / 1000,
            temperature_c=temperature,
        )


def gpu_reader() -> GpuReader:
    """Return the reader of this node's GPUs; `NoGpus` where there is no driver."""
    import pynvml

    try:
        return NvmlGpus()
    except pynvml.NVMLError:
        return NoGpus()


class SystemSampler:
    """Sample one node again and again; rates are over the time since the last sample."""

    def __init__(self, node: str, disk_path: Path, gpus: GpuReader | None = None) -> None:
        self._prefix = f"system/{segment(node)}"
        self._disk_path = str(disk_path)
        self._gpus = gpu_reader() if gpus is None else gpus
        self._network: tuple[float, int, int] | None = None
        # The first call only sets the mark from which the next one measures.
        psutil.cpu_percent(None)

    def sample(self, pids: Mapping[str, int] | None = None) -> dict[str, float]:
        """Return the metrics of this node by full name.

        `pids` maps a label, such as `rank-0`, to a process of this node; one that is gone is left
        out. A rate is absent from the first sample.
        """
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(self._disk_path)
        values: dict[str, float] = {
            "cpu_percent": psutil.cpu_percent(None),
            "load_1m": psutil.getloadavg()[0],
            "memory_used_bytes": memory.total - memory.available,
            "memory_available_bytes": memory.available,
            "disk_used_bytes": disk.used,
            "disk_available_bytes": disk.free,
        }
        values.update(self._network_rates())
        for label, pid in (pids or {}).items():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                rss_bytes = psutil.Process(pid).memory_info().rss
                values[f"process/{segment(label)}/rss_bytes"] = rss_bytes
        for index, gpu in enumerate(self._gpus.read()):
            for field, value in vars(gpu).items():
                if value is not None:
                    values[f"gpu/{index}/{field}"] = value
        return {f"{self._prefix}/{name}": float(value) for name, value in values.items()}

    def _network_rates(self) -> dict[str, float]:
        counters = psutil.net_io_counters()
        if counters is None:
            return {}
        now = time.monotonic()
        before, self._network = self._network, (now, counters.bytes_sent, counters.bytes_recv)
        if before is None or now <= before[0]:
            return {}
        seconds = now - before[0]
        return {
            "network_sent_bytes_per_s": (counters.bytes_sent - before[1]) / seconds,
            "network_received_bytes_per_s": (counters.bytes_recv - before[2]) / seconds,
        }
