"""Read NVIDIA GPUs through NVML: what they are, how they are, and the XID events they report.

    Nvml       read() -> Reading, events(timeout_s) -> [Xid], close()
    RealNvml   the driver's library, through pynvml
    FakeNvml   a scripted timeline of readings and XIDs (nvml_fake.py)

The same rules run over both (nvml_findings.py). A machine without a driver reads as absent, which
is not the same as healthy. A value that a GPU does not have is None.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class LinkReading:
    """One NVLink. The counters are of all time since the GPU was reset."""

    index: int
    is_up: bool
    num_replays: int | None = None
    num_recoveries: int | None = None
    num_crc_errors: int | None = None


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one instant.

    `lost` says why the driver does not reach it any more; the other values are then None.
    `throttle_reasons` is NVML's bit mask. ECC counters: volatile since the driver was loaded,
    aggregate of all time. `recovery_action` is the driver's own verdict (field 230).
    """

    index: int
    name: str
    uuid: str = ""
    bus_id: str = ""
    lost: str = ""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization_percent: float | None = None
    temperature_c: float | None = None
    slowdown_temperature_c: float | None = None
    throttle_reasons: int | None = None
    ecc_volatile_uncorrected: int | None = None
    ecc_aggregate_uncorrected: int | None = None
    remap_is_pending: bool | None = None
    remap_has_failed: bool | None = None
    pcie_generation: int | None = None
    pcie_max_generation: int | None = None
    pcie_width: int | None = None
    pcie_max_width: int | None = None
    links: tuple[LinkReading, ...] = ()
    recovery_action: int | None = None


@dataclass(frozen=True)
class Reading:
    """All GPUs of this machine. `absent` says why there is no driver to ask, else it is empty.

    `trouble` says why a driver that is there cannot be asked.
    """

    absent: str = ""
    trouble: str = ""
    driver_version: str = ""
    nvml_version: str = ""
    gpus: tuple[GpuReading, ...] = ()


@dataclass(frozen=True)
class Xid:
    """An error that the driver reported. `gpu` None: its bus id is of no GPU that we see."""

    number: int
    gpu: int | None
    bus_id: str = ""


class Nvml(Protocol):
    """Where readings and events come from."""

    def read(self) -> Reading:
        """Return all GPUs as they are now."""

    def events(self, timeout_s: float) -> list[Xid]:
        """Return the XIDs since the last call; wait for one at most `timeout_s`."""

    def close(self) -> None:
        """Let go of the library."""


# What a kernel line of the driver says: NVRM: Xid (PCI:0000:3b:00): 79, pid=1, ...
_XIDS_IN_LOG = re.compile(r"NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+)")
_KMSG = Path("/dev/kmsg")
# NVML_VALUE_TYPE_* -> the member of its union that holds the value.
_VALUE_MEMBERS = dict(enumerate(("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")))


class RealNvml:
    """The driver's library. `module` is pynvml, or what stands for it.

    Never raises: what cannot be read is None, and what cannot be asked is said in the reading.
    """

    def __init__(self, module: Any = None) -> None:
        if module is None:
            import pynvml

            module = pynvml
        self._nvml = module
        self._absent = self._trouble = ""
        self._handles: list[Any] = []
        self._event_set: Any = None
        try:
            module.nvmlInit()
        except (module.NVMLError_LibraryNotFound, module.NVMLError_DriverNotLoaded) as error:
            self._absent = _words(error)
        except module.NVMLError as error:
            self._trouble = _words(error)

    def read(self) -> Reading:
        """Return all GPUs as they are now."""
        if self._absent or self._trouble:
            return Reading(absent=self._absent, trouble=self._trouble)
        nvml = self._nvml
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            return Reading(trouble=_words(error))
        return Reading(
            driver_version=self._get(nvml.nvmlSystemGetDriverVersion) or "",
            nvml_version=self._get(nvml.nvmlSystemGetNVMLVersion) or "",
            gpus=tuple(self._read_gpu(index) for index in range(count)),
        )

    def events(self, timeout_s: float) -> list[Xid]:
        """Return the XIDs since the last call; wait for one at most `timeout_s`."""
        nvml = self._nvml
        found: list[Xid] = []
        if not self._watches_events():
            time.sleep(timeout_s)
            return []
        wait_ms = int(timeout_s * 1000)
        while True:
            try:
                data = nvml.nvmlEventSetWait_v2(self._event_set, wait_ms)
            except nvml.NVMLError:  # a time-out, or a GPU that is lost: `read` tells of it
                return found
            if data.eventType == nvml.nvmlEventTypeXidCriticalError:
                bus_id = self._get(lambda device=data.device: _bus_id(nvml, device)) or ""
                gpu = self._get(nvml.nvmlDeviceGetIndex, data.device)
                found.append(Xid(int(data.eventData), gpu, bus_id))
            wait_ms = 0

    def close(self) -> None:
        """Let go of the library."""
        if self._absent or self._trouble:
            return
        if self._event_set is not None:
            self._get(self._nvml.nvmlEventSetFree, self._event_set)
            self._event_set = None
        self._get(self._nvml.nvmlShutdown)

    def _watches_events(self) -> bool:
        if self._absent or self._trouble:
            return False
        if self._event_set is None:
            nvml = self._nvml
            self._event_set = self._get(nvml.nvmlEventSetCreate)
            for index in range(self._get(nvml.nvmlDeviceGetCount) or 0):
                handle = self._get(nvml.nvmlDeviceGetHandleByIndex, index)
                kind = nvml.nvmlEventTypeXidCriticalError
                if handle is not None and self._event_set is not None:
                    self._get(nvml.nvmlDeviceRegisterEvents, handle, kind, self._event_set)
        return self._event_set is not None

    def _read_gpu(self, index: int) -> GpuReading:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            return GpuReading(index, f"GPU {index}", lost=_words(error))
        rows = self._get(nvml.nvmlDeviceGetRemappedRows, handle)
        rates = self._get(nvml.nvmlDeviceGetUtilizationRates, handle)
        uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        return GpuReading(
            index=index,
            name=_text(name),
            uuid=_text(self._get(nvml.nvmlDeviceGetUUID, handle) or ""),
            bus_id=self._get(lambda: _bus_id(nvml, handle)) or "",
            memory_used_bytes=int(memory.used),
            memory_total_bytes=int(memory.total),
            utilization_percent=None if rates is None else float(rates.gpu),
            temperature_c=self._get(
                nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU
            ),
            slowdown_temperature_c=self._get(
                nvml.nvmlDeviceGetTemperatureThreshold,
                handle,
                nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN,
            ),
            throttle_reasons=self._get(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle),
            ecc_volatile_uncorrected=self._get(
                nvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, nvml.NVML_VOLATILE_ECC
            ),
            ecc_aggregate_uncorrected=self._get(
                nvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, nvml.NVML_AGGREGATE_ECC
            ),
            remap_is_pending=None if rows is None else bool(rows[2]),
            remap_has_failed=None if rows is None else bool(rows[3]),
            pcie_generation=self._get(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            pcie_max_generation=self._get(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
            pcie_width=self._get(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            pcie_max_width=self._get(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
            links=tuple(self._links(handle)),
            recovery_action=self._field(handle, nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION),
        )

    def _links(self, handle: Any) -> Iterator[LinkReading]:
        nvml = self._nvml
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            state = self._get(nvml.nvmlDeviceGetNvLinkState, handle, link)
            if state is None:
                continue  # the GPU has not so many

            def count(kind: int, link: int = link) -> int | None:
                value = self._get(nvml.nvmlDeviceGetNvLinkErrorCounter, handle, link, kind)
                return None if value is None else int(value)

            yield LinkReading(
                index=link,
                is_up=state == nvml.NVML_FEATURE_ENABLED,
                num_replays=count(nvml.NVML_NVLINK_ERROR_DL_REPLAY),
                num_recoveries=count(nvml.NVML_NVLINK_ERROR_DL_RECOVERY),
                num_crc_errors=count(nvml.NVML_NVLINK_ERROR_DL_CRC_FLIT),
            )

    def _field(self, handle: Any, field: int) -> int | None:
        values = self._get(self._nvml.nvmlDeviceGetFieldValues, handle, [field])
        if values is None or values[0].nvmlReturn != 0:
            return None
        member = _VALUE_MEMBERS.get(values[0].valueType)
        return None if member is None else int(getattr(values[0].value, member))

    def _get(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a call gives; None where this GPU or driver does not know it."""
        with contextlib.suppress(self._nvml.NVMLError):
            return function(*arguments)
        return None


def kernel_xids(gpus: Sequence[GpuReading], path: Path = _KMSG) -> list[Xid]:
    """Return the XIDs that the kernel's log holds; none where it is closed to us.

    The driver writes them there since the machine was started.
    """
    index_of = {_place(gpu.bus_id): gpu.index for gpu in gpus}
    return [
        Xid(int(number), index_of.get(_place(bus_id)), bus_id)
        for bus_id, number in _XIDS_IN_LOG.findall(_kernel_log(path))
    ]


def _place(bus_id: str) -> tuple[int, ...]:
    """Return domain, bus and device, which NVML and the kernel write unlike each other."""
    parts = bus_id.partition(".")[0].split(":")
    try:
        return tuple(int(part, 16) for part in parts)
    except ValueError:
        return ()


def _kernel_log(path: Path) -> str:
    text = []
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        while True:
            try:
                record = os.read(descriptor, 1 << 16)
            except BrokenPipeError:
                continue  # records were overwritten meanwhile; the next read goes on behind them
            except OSError:
                break  # no more records
            if not record:
                break
            text.append(record.decode("latin-1"))
    finally:
        os.close(descriptor)
    return "".join(text)


def _bus_id(nvml: Any, handle: Any) -> str:
    return _text(nvml.nvmlDeviceGetPciInfo(handle).busId)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _words(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
