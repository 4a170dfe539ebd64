"""What readings of GPUs mean: one finding per thing that is wrong, with the mend. Pure.

    judge(reading, before=None, xids=()) -> [GpuFinding, ...]

Counters that are not errors by themselves (NVLink replays) are judged by their growth since
`before`. What is not judged, and why: the software power cap, which a busy GPU reaches by design;
the PCIe generation of an idle GPU, which sleeps at a lower one; corrected ECC errors.

Source: NVIDIA's XID catalogue and NVML's documentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gangline.monitoring.nvml import GpuReading, LinkReading, Reading, Xid

# ok: nothing to do; absent: there is nothing to judge; warning: slower, or has been wrong;
# broken: work on this GPU fails or gives wrong numbers.
Level = Literal["ok", "absent", "warning", "broken"]

_HOT_MARGIN_C = 5.0
_HOT_WITHOUT_LIMIT_C = 87.0
_BUSY_PERCENT = 50.0
_FULL_SHARE = 0.9
# NVML's bits for clocks that are held down by something that is wrong.
_THROTTLES = {
    8: ("hardware slowdown", "check power supply and cooling"),
    32: ("software thermal slowdown", "check fans, air flow and inlet temperature"),
    64: ("hardware thermal slowdown", "check fans, air flow and inlet temperature"),
    128: ("power brake", "check power supply and the chassis' power limit"),
}
_RECOVERIES = {
    1: "reset the GPU: nvidia-smi --gpu-reset -i {index}",
    2: "reboot the node",
    3: "drain the node's peer-to-peer jobs, then reset the GPU",
    4: "drain the node, then reset the GPU",
}
# XID -> what it means, what to do, and whether the GPU can go on.
_XIDS: dict[int, tuple[str, str, Level]] = {
    13: ("an application's illegal access or kernel fault", "debug the program", "warning"),
    31: ("an application's memory page fault", "debug the program", "warning"),
    43: ("an application's channel was reset", "debug the program", "warning"),
    45: ("an application was ended on the GPU", "look for the XID before it", "warning"),
    48: ("a double-bit memory error", "reset the GPU, and look at its row remapping", "broken"),
    62: ("the GPU's own controller halted", "reset the GPU; replace it if it returns", "broken"),
    63: ("a memory row is to be remapped", "reset the GPU when it is idle", "warning"),
    64: ("a memory row could not be remapped", "replace the GPU", "broken"),
    74: ("an NVLink error", "check the NVLink counters; reset the GPU and its peers", "broken"),
    79: ("the GPU has fallen off the bus", "reboot the node; check power and seating", "broken"),
    92: ("many corrected memory errors", "watch it; replace the GPU if they go on", "warning"),
    94: ("a contained memory error", "start the application again", "warning"),
    95: ("an uncontained memory error", "drain the node and reset the GPU", "broken"),
    119: ("the GPU's system processor does not answer", "reset the GPU", "broken"),
    120: ("the GPU's system processor failed", "reset the GPU", "broken"),
    140: ("an unrecovered memory error", "reset the GPU", "broken"),
}


@dataclass(frozen=True)
class GpuFinding:
    """One thing about one GPU (`gpu` None: about all). `rule` names what was judged."""

    gpu: int | None
    rule: str
    level: Level
    found: str
    mend: str = ""


def judge(
    reading: Reading, before: Reading | None = None, xids: Sequence[Xid] = ()
) -> list[GpuFinding]:
    """Return what there is to say: of every healthy GPU one line that names it."""
    if reading.absent:
        return [GpuFinding(None, "driver", "absent", reading.absent)]
    if reading.trouble:
        mend = "load the driver that fits the library: reboot, or reinstall the driver"
        return [GpuFinding(None, "driver", "broken", reading.trouble, mend)]
    found = f"driver {reading.driver_version}, NVML {reading.nvml_version}"
    findings = [GpuFinding(None, "driver", "ok", f"{found}, {len(reading.gpus)} GPUs")]
    earlier = {gpu.index: gpu for gpu in before.gpus} if before is not None else {}
    for gpu in reading.gpus:
        wrong = list(_judge_gpu(gpu, earlier.get(gpu.index)))
        wrong += [_judge_xid(xid) for xid in _unique(xids) if xid.gpu == gpu.index]
        findings += wrong or [GpuFinding(gpu.index, "gpu", "ok", _describe(gpu))]
    strangers = [xid for xid in _unique(xids) if xid.gpu is None]
    return findings + [_judge_xid(xid) for xid in strangers]


def _judge_gpu(gpu: GpuReading, before: GpuReading | None) -> Iterator[GpuFinding]:
    if gpu.lost:
        mend = "reboot the node; if it comes back, check power, cabling and seating"
        yield GpuFinding(gpu.index, "lost", "broken", f"cannot be reached: {gpu.lost}", mend)
        return
    yield from _memory(gpu)
    yield from _heat(gpu)
    yield from _ecc(gpu)
    yield from _pcie(gpu)
    yield from _nvlink(gpu, before)
    if gpu.recovery_action:
        mend = _RECOVERIES.get(gpu.recovery_action, "see NVML's nvmlDeviceGpuRecoveryAction")
        said = f"the driver wants a recovery (action {gpu.recovery_action})"
        yield GpuFinding(gpu.index, "recovery", "broken", said, mend.format(index=gpu.index))


def _memory(gpu: GpuReading) -> Iterator[GpuFinding]:
    used, total = gpu.memory_used_bytes, gpu.memory_total_bytes
    if used is not None and total and used > _FULL_SHARE * total:
        said = f"{_gib(used)} of {_gib(total)} are in use"
        mend = "see whose they are with nvidia-smi, and end what should not be there"
        yield GpuFinding(gpu.index, "memory", "warning", said, mend)


def _heat(gpu: GpuReading) -> Iterator[GpuFinding]:
    temperature_c, limit_c = gpu.temperature_c, gpu.slowdown_temperature_c
    if temperature_c is not None:
        hot_c = limit_c - _HOT_MARGIN_C if limit_c is not None else _HOT_WITHOUT_LIMIT_C
        if temperature_c >= hot_c:
            limit = f"slows down at {limit_c:g}" if limit_c is not None else "limit not known"
            said = f"{temperature_c:g} degrees C, {limit}"
            mend = "check fans, air flow and inlet temperature"
            yield GpuFinding(gpu.index, "temperature", "warning", said, mend)
    for bit, (name, mend) in _THROTTLES.items():
        if (gpu.throttle_reasons or 0) & bit:
            yield GpuFinding(
                gpu.index, f"throttle {bit}", "warning", f"clocks held down: {name}", mend
            )


def _ecc(gpu: GpuReading) -> Iterator[GpuFinding]:
    if gpu.ecc_volatile_uncorrected:
        said = f"{gpu.ecc_volatile_uncorrected} uncorrected memory errors since the driver started"
        mend = f"end its programs, then nvidia-smi --gpu-reset -i {gpu.index}"
        yield GpuFinding(gpu.index, "ecc volatile", "broken", said, mend)
    elif gpu.ecc_aggregate_uncorrected:
        said = f"{gpu.ecc_aggregate_uncorrected} uncorrected memory errors in its life, none now"
        mend = "watch it; replace the GPU if they go on"
        yield GpuFinding(gpu.index, "ecc aggregate", "warning", said, mend)
    if gpu.remap_has_failed:
        said = "a memory row could not be remapped: no spare rows are left"
        yield GpuFinding(gpu.index, "remap failure", "broken", said, "replace the GPU")
    elif gpu.remap_is_pending:
        said = "a memory row waits to be remapped"
        mend = f"end its programs, then nvidia-smi --gpu-reset -i {gpu.index}"
        yield GpuFinding(gpu.index, "remap pending", "broken", said, mend)


def _pcie(gpu: GpuReading) -> Iterator[GpuFinding]:
    mend = "reseat the card or riser; check the slot's width and the BIOS setting of its speed"
    width, most = gpu.pcie_width, gpu.pcie_max_width
    if width is not None and most is not None and width < most:
        said = f"PCIe at x{width} of x{most}"
        yield GpuFinding(gpu.index, "pcie width", "warning", said, mend)
    speed, fastest = gpu.pcie_generation, gpu.pcie_max_generation
    is_busy = (gpu.utilization_percent or 0.0) >= _BUSY_PERCENT
    if speed is not None and fastest is not None and speed < fastest and is_busy:
        said = f"PCIe at generation {speed} of {fastest} while it works"
        yield GpuFinding(gpu.index, "pcie generation", "warning", said, mend)


def _nvlink(gpu: GpuReading, before: GpuReading | None) -> Iterator[GpuFinding]:
    up = [link for link in gpu.links if link.is_up]
    down = [link for link in gpu.links if not link.is_up]
    if up and down:  # a GPU none of whose links is up is not wired for NVLink
        names = ", ".join(str(link.index) for link in down)
        said = f"NVLink {names} of {len(gpu.links)} down"
        mend = "reset all GPUs of the node; then check the bridge or the NVSwitch's log"
        yield GpuFinding(gpu.index, "nvlink state", "warning", said, mend)
    earlier = {link.index: link for link in before.links} if before is not None else {}
    for link in gpu.links:
        grown = _grown(link, earlier.get(link.index))
        if grown:
            said = f"NVLink {link.index}: {', '.join(grown)} since the last look"
            mend = "if they go on, reset the GPU and its peers; then check the bridge or NVSwitch"
            yield GpuFinding(gpu.index, f"nvlink {link.index} errors", "warning", said, mend)


def _grown(link: LinkReading, before: LinkReading | None) -> list[str]:
    if before is None:
        return []
    pairs = (
        ("replays", link.num_replays, before.num_replays),
        ("recoveries", link.num_recoveries, before.num_recoveries),
        ("CRC errors", link.num_crc_errors, before.num_crc_errors),
    )
    return [
        f"{now - then} {name}"
        for name, now, then in pairs
        if now is not None and then is not None and now > then
    ]


def _judge_xid(xid: Xid) -> GpuFinding:
    meaning, mend, level = _XIDS.get(
        xid.number, ("no common one", "look it up in NVIDIA's XID catalogue", "warning")
    )
    where = f" on {xid.bus_id}" if xid.gpu is None and xid.bus_id else ""
    said = f"XID {xid.number}{where}: {meaning}"
    return GpuFinding(xid.gpu, f"xid {xid.number}", level, said, mend)


def _unique(xids: Sequence[Xid]) -> list[Xid]:
    return list(dict.fromkeys(xids))


def _describe(gpu: GpuReading) -> str:
    text = gpu.name
    if gpu.memory_used_bytes is not None and gpu.memory_total_bytes is not None:
        free = gpu.memory_total_bytes - gpu.memory_used_bytes
        text += f", {_gib(free)} free of {_gib(gpu.memory_total_bytes)}"
    if gpu.temperature_c is not None:
        text += f", {gpu.temperature_c:g} degrees C"
    num_up = sum(link.is_up for link in gpu.links)
    return text + (f", {num_up} NVLinks up" if num_up else "")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
