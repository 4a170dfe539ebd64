"""Readings of GPUs: every rule fires where it must and is silent where it must not."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from gangline.monitoring.nvml import GpuReading, LinkReading, RealNvml, Xid, kernel_xids
from gangline.monitoring.nvml_fake import Change, FakeNvml
from gangline.monitoring.nvml_findings import _THROTTLES, _XIDS, judge

GIB = 2**30
HEALTHY = GpuReading(
    index=0,
    name="NVIDIA H100 80GB HBM3",
    bus_id="00000000:3B:00.0",
    memory_used_bytes=GIB,
    memory_total_bytes=80 * GIB,
    utilization_percent=97.0,
    temperature_c=60.0,
    slowdown_temperature_c=90.0,
    throttle_reasons=4,  # the software power cap, which is normal under load
    ecc_volatile_uncorrected=0,
    ecc_aggregate_uncorrected=0,
    remap_is_pending=False,
    remap_has_failed=False,
    pcie_generation=5,
    pcie_max_generation=5,
    pcie_width=16,
    pcie_max_width=16,
    links=tuple(LinkReading(i, True, 0, 0, 0) for i in range(18)),
    recovery_action=0,
)
SECOND = dataclasses.replace(HEALTHY, index=1, bus_id="00000000:5E:00.0")


def findings_after(*changes: Change, xids: bool = True) -> list[tuple[int | None, str, str]]:
    """Play a script over two GPUs; return (gpu, rule, level) of all that is not ok."""
    fake = FakeNvml([HEALTHY, SECOND], changes)
    before = fake.read()
    fake.advance(10.0)
    found = judge(fake.read(), before, fake.events(0.0) if xids else ())
    return [(one.gpu, one.rule, one.level) for one in found if one.level != "ok"]


def test_a_healthy_machine_has_one_line_per_gpu():
    fake = FakeNvml([HEALTHY, SECOND])
    found = judge(fake.read(), fake.read(), fake.events(0.0))
    assert [(one.gpu, one.level) for one in found] == [(None, "ok"), (0, "ok"), (1, "ok")]
    assert found[0].found == "driver 580.82, NVML 13.580.82, 2 GPUs"
    assert found[1].found == (
        "NVIDIA H100 80GB HBM3, 79.0 GiB free of 80.0 GiB, 60 degrees C, 18 NVLinks up"
    )


def test_a_gpu_that_tells_nothing_is_not_accused():
    bare = GpuReading(index=0, name="old")
    assert [one.level for one in judge(FakeNvml([bare]).read())] == ["ok", "ok"]


RULES: list[tuple[str, dict[str, Any], str]] = [
    ("lost", {"lost": "GPU is lost"}, "broken"),
    ("memory", {"memory_used_bytes": 73 * GIB}, "warning"),
    ("temperature", {"temperature_c": 85.0}, "warning"),
    ("temperature", {"temperature_c": 88.0, "slowdown_temperature_c": None}, "warning"),
    *((f"throttle {bit}", {"throttle_reasons": 4 | bit}, "warning") for bit in _THROTTLES),
    ("ecc volatile", {"ecc_volatile_uncorrected": 1}, "broken"),
    ("ecc aggregate", {"ecc_aggregate_uncorrected": 1}, "warning"),
    ("remap pending", {"remap_is_pending": True}, "broken"),
    ("remap failure", {"remap_has_failed": True}, "broken"),
    ("pcie width", {"pcie_width": 8}, "warning"),
    ("pcie generation", {"pcie_generation": 3}, "warning"),
    ("nvlink state", {"links.7.is_up": False}, "warning"),
    ("nvlink 3 errors", {"links.3.num_replays": 2}, "warning"),
    ("nvlink 4 errors", {"links.4.num_recoveries": 1}, "warning"),
    ("nvlink 5 errors", {"links.5.num_crc_errors": 9}, "warning"),
    ("recovery", {"recovery_action": 1}, "broken"),
    ("recovery", {"recovery_action": 99}, "broken"),
]


@pytest.mark.parametrize(("rule", "fields", "level"), RULES)
def test_a_rule_fires_on_the_gpu_that_it_is_about(rule, fields, level):
    assert findings_after(Change(5.0, 1, fields)) == [(1, rule, level)]


def test_each_bad_thing_has_a_mend_and_its_figures():
    for rule, fields, _ in RULES:
        fake = FakeNvml([HEALTHY], [Change(0.0, 0, fields)])
        before = FakeNvml([HEALTHY]).read()
        bad = [one for one in judge(fake.read(), before) if one.level != "ok"]
        assert bad, rule
        assert bad[0].mend, rule
    fake = FakeNvml([HEALTHY], [Change(0.0, 0, {"pcie_width": 8, "recovery_action": 1})])
    found = {one.rule: one for one in judge(fake.read())}
    assert found["pcie width"].found == "PCIe at x8 of x16"
    assert found["recovery"].mend == "reset the GPU: nvidia-smi --gpu-reset -i 0"


@pytest.mark.parametrize(
    "fields",
    [
        {"memory_used_bytes": 71 * GIB},
        {"temperature_c": 84.9},
        {"temperature_c": 86.0, "slowdown_temperature_c": None},
        {"throttle_reasons": 1 | 2 | 4 | 16 | 256},
        {"pcie_generation": 1, "utilization_percent": 3.0},  # an idle link sleeps
        {"recovery_action": None},
        {"links": ()},
        {"links": tuple(LinkReading(i, False) for i in range(18))},  # not wired for NVLink
    ],
)
def test_a_rule_is_silent_just_below_its_bound(fields):
    assert findings_after(Change(1.0, 0, fields)) == []


def test_link_counters_are_judged_by_their_growth():
    old = Change(0.0, 0, {"links.3.num_replays": 500})
    assert findings_after(old) == [], "they were there before"
    assert findings_after(old, Change(1.0, 0, {"links.3.num_replays": 501})) == [
        (0, "nvlink 3 errors", "warning")
    ]
    assert findings_after(old, Change(1.0, 0, {"links.3.num_replays": 0})) == [], "it was reset"
    assert judge(FakeNvml([HEALTHY], [old]).read())[-1].level == "ok", "nothing to compare with"


@pytest.mark.parametrize("number", [*sorted(_XIDS), 12345])
def test_every_xid_is_told_once_on_its_gpu(number):
    level = _XIDS[number][2] if number in _XIDS else "warning"
    twice = [Change(2.0, 1, xid=number), Change(3.0, 1, xid=number)]
    assert findings_after(*twice) == [(1, f"xid {number}", level)]
    assert findings_after(Change(20.0, 1, xid=number)) == [], "not yet"


def test_an_xid_of_a_gpu_that_we_do_not_see_is_told_too():
    fake = FakeNvml([HEALTHY])
    found = judge(fake.read(), xids=[Xid(79, None, "0000:99:00")])
    assert (found[-1].gpu, found[-1].found) == (
        None, "XID 79 on 0000:99:00: the GPU has fallen off the bus",
    )  # fmt: skip


def test_events_are_told_once_and_the_script_plays_in_order():
    fake = FakeNvml(
        [HEALTHY],
        [
            Change(3.0, 0, {"temperature_c": 70.0}),
            Change(1.0, 0, {"temperature_c": 65.0}),
            Change(2.0, 0, xid=94),
        ],
    )
    fake.advance(1.0)
    assert fake.read().gpus[0].temperature_c == 65.0
    assert fake.events(0.0) == []
    fake.advance(5.0)
    assert fake.read().gpus[0].temperature_c == 70.0
    assert fake.events(0.0) == [Xid(94, 0, "00000000:3B:00.0")]
    assert fake.events(0.0) == []
    fake.close()
    assert fake.is_closed


def test_absent_is_not_healthy_and_a_driver_in_trouble_is_broken():
    (found,) = judge(FakeNvml(absent="NVML Shared Library Not Found").read())
    assert (found.level, found.found) == ("absent", "NVML Shared Library Not Found")
    (found,) = judge(FakeNvml(trouble="Driver/library version mismatch").read())
    assert found.level == "broken"
    assert "reboot" in found.mend


# The real reader, over a stand-in for the library.


class Library:
    """Stands in for pynvml: its constants and errors, and functions of our own."""

    def __init__(self, **functions: Any) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        if name in self._functions:
            return self._functions[name]
        if name.startswith("nvml") and callable(getattr(pynvml, name)):

            def missing(*arguments: Any) -> Any:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

            return missing
        return getattr(pynvml, name)


def field_value(value: int, kind: int = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT) -> Any:
    union = SimpleNamespace(uiVal=value, ullVal=value + 1000)
    return [SimpleNamespace(nvmlReturn=0, valueType=kind, value=union)]


def a_library(**more: Any) -> Library:
    events = [
        SimpleNamespace(eventType=pynvml.nvmlEventTypeXidCriticalError, eventData=79, device=1),
        SimpleNamespace(eventType=pynvml.nvmlEventTypeDoubleBitEccError, eventData=0, device=0),
    ]

    def wait(event_set: Any, wait_ms: int) -> Any:
        if not events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        return events.pop(0)

    def link_state(handle: int, link: int) -> int:
        if link > 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return int(link == 0)

    functions: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlSystemGetDriverVersion": lambda: "580.82",
        "nvmlSystemGetNVMLVersion": lambda: "13.580.82",
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: b"NVIDIA L4",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=3, total=10),
        "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(busId=f"00000000:0{handle}:00.0"),
        "nvmlDeviceGetRemappedRows": lambda handle: (1, 2, 0, 1),
        "nvmlDeviceGetTotalEccErrors": lambda handle, kind, counter: 10 * kind + counter,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 55,
        "nvmlDeviceGetTemperatureThreshold": lambda handle, kind: 90 + kind,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 64,
        "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 3,
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 4,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 8,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
        "nvmlDeviceGetNvLinkState": link_state,
        "nvmlDeviceGetNvLinkErrorCounter": lambda handle, link, kind: 100 * link + kind,
        "nvmlDeviceGetFieldValues": lambda handle, fields: field_value(fields[0]),
        "nvmlEventSetCreate": lambda: object(),
        "nvmlEventSetFree": lambda event_set: None,
        "nvmlDeviceRegisterEvents": lambda handle, kind, event_set: None,
        "nvmlEventSetWait_v2": wait,
        "nvmlDeviceGetIndex": lambda device: device,
    }
    return Library(**{**functions, **more})


def test_the_real_reader_reads_every_value_by_its_name():
    nvml = RealNvml(a_library())
    reading = nvml.read()
    assert (reading.driver_version, reading.nvml_version) == ("580.82", "13.580.82")
    gpu = reading.gpus[1]
    assert gpu == GpuReading(
        index=1,
        name="NVIDIA L4",
        bus_id="00000000:01:00.0",
        memory_used_bytes=3,
        memory_total_bytes=10,
        temperature_c=55,
        slowdown_temperature_c=91,
        throttle_reasons=64,
        ecc_volatile_uncorrected=10,
        ecc_aggregate_uncorrected=11,
        remap_is_pending=False,
        remap_has_failed=True,
        pcie_generation=3,
        pcie_max_generation=4,
        pcie_width=8,
        pcie_max_width=16,
        links=(LinkReading(0, True, 0, 1, 2), LinkReading(1, False, 100, 101, 102)),
        recovery_action=230,
    )
    assert nvml.events(0.0) == [Xid(79, 1, "00000000:01:00.0")]
    assert nvml.events(0.0) == []
    nvml.close()


def test_a_field_is_read_by_its_type_and_one_that_failed_is_none():
    wide = field_value(7, pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG)
    gpu = RealNvml(a_library(nvmlDeviceGetFieldValues=lambda h, f: wide)).read().gpus[0]
    assert gpu.recovery_action == 1007
    failed = [SimpleNamespace(nvmlReturn=3, valueType=1, value=SimpleNamespace(uiVal=1))]
    gpu = RealNvml(a_library(nvmlDeviceGetFieldValues=lambda h, f: failed)).read().gpus[0]
    assert gpu.recovery_action is None


def raises(code: int) -> Any:
    def fail(*arguments: Any) -> Any:
        raise pynvml.NVMLError(code)

    return fail


def test_a_gpu_that_is_lost_does_not_hide_the_others():
    def handle(index: int) -> int:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    reading = RealNvml(a_library(nvmlDeviceGetHandleByIndex=handle)).read()
    assert reading.gpus[0].lost == "GPU is lost"
    assert reading.gpus[1].lost == ""
    assert judge(reading)[1].rule == "lost"


@pytest.mark.parametrize("code", ["NVML_ERROR_LIBRARY_NOT_FOUND", "NVML_ERROR_DRIVER_NOT_LOADED"])
def test_without_a_driver_all_is_absent(code):
    nvml = RealNvml(a_library(nvmlInit=raises(getattr(pynvml, code))))
    assert nvml.read().absent
    assert nvml.events(0.0) == []
    nvml.close()
    assert judge(nvml.read())[0].level == "absent"


def test_a_driver_that_does_not_fit_its_library_is_trouble():
    nvml = RealNvml(a_library(nvmlInit=raises(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)))
    assert judge(nvml.read())[0].level == "broken"
    late = RealNvml(a_library(nvmlDeviceGetCount=raises(pynvml.NVML_ERROR_UNKNOWN)))
    assert judge(late.read())[0].level == "broken"


def test_the_kernel_s_log_names_gpus_in_another_spelling(tmp_path: Path):
    log = tmp_path / "kmsg"
    log.write_text(
        "4,1,2,-;usb 1-1: new device\n"
        "3,2,9,-;NVRM: Xid (PCI:0000:5e:00): 79, pid=123, GPU has fallen off the bus.\n"
        "3,3,9,-;NVRM: Xid (PCI:0000:99:00.0): 13, Graphics Exception\n"
        "3,4,9,-;NVRM: Xid without a number\n"
    )
    gpus = FakeNvml([HEALTHY, SECOND]).read().gpus
    assert kernel_xids(gpus, log) == [Xid(79, 1, "0000:5e:00"), Xid(13, None, "0000:99:00.0")]
    assert kernel_xids(gpus, tmp_path / "none") == []


def test_on_a_machine_without_a_driver_the_real_reader_says_so():
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("this machine has an NVIDIA driver")
    nvml = RealNvml()
    assert nvml.read().absent
    nvml.close()
