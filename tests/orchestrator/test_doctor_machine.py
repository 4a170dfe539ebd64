"""The doctor on GPUs (over a scripted NVML) and on the lab: each bad thing with its mend."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from gangline.monitoring.nvml import GpuReading
from gangline.monitoring.nvml_fake import Change, FakeNvml
from gangline.orchestrator import doctor_machine
from gangline.orchestrator.doctor_finding import Finding
from gangline.orchestrator.doctor_machine import gpu_findings, lab_findings

GPU = GpuReading(
    index=0,
    name="NVIDIA H100",
    bus_id="00000000:3B:00.0",
    memory_used_bytes=0,
    memory_total_bytes=80 * 2**30,
)


def examine(*changes: Change, log: str = "", tmp_path: Path, **options: Any) -> list[Finding]:
    gpus = [GPU, dataclasses.replace(GPU, index=1, bus_id="00000000:5E:00.0")]
    fake = FakeNvml(gpus, changes, **options)
    (tmp_path / "kmsg").write_text(log)
    found = list(gpu_findings(lambda: fake, kernel_log=tmp_path / "kmsg"))
    assert fake.is_closed
    assert len({one.check for one in found}) == len(found)
    for one in found:
        assert one.level == "ok" or one.mend, one
    return found


def test_healthy_gpus(tmp_path: Path) -> None:
    found = examine(tmp_path=tmp_path)
    assert [(one.check, one.level) for one in found] == [
        ("gpus", "ok"), ("gpu 0", "ok"), ("gpu 1", "ok"),
    ]  # fmt: skip
    assert found[1].found == "NVIDIA H100, 80.0 GiB free of 80.0 GiB"


def test_broken_things_are_missing_and_slow_ones_are_warnings(tmp_path: Path) -> None:
    found = examine(
        Change(0.0, 0, {"ecc_volatile_uncorrected": 2, "pcie_width": 4, "pcie_max_width": 16}),
        Change(0.0, 1, xid=79),
        tmp_path=tmp_path,
    )
    told = {one.check: (one.level, one.mend) for one in found}
    assert told["gpu 0 ecc volatile"] == (
        "missing", "end its programs, then nvidia-smi --gpu-reset -i 0",
    )  # fmt: skip
    assert told["gpu 0 pcie width"][0] == "warning"
    assert told["gpu 1 xid 79"][0] == "missing"


def test_an_xid_of_the_past_is_a_warning(tmp_path: Path) -> None:
    log = "3,2,9,-;NVRM: Xid (PCI:0000:5e:00): 79, pid=123, GPU has fallen off the bus.\n"
    found = examine(log=2 * log, tmp_path=tmp_path)
    (old,) = [one for one in found if "xid" in one.check]
    assert (old.check, old.level) == ("gpu 1 xid 79", "warning")
    assert "since the start of the machine" in old.found


def test_no_driver_is_absent_and_a_broken_one_is_missing(tmp_path: Path) -> None:
    (found,) = examine(absent="NVML Shared Library Not Found", tmp_path=tmp_path)
    assert found.level == "ok"
    assert found.found == "absent (NVML Shared Library Not Found); jobs run on the CPU"
    (found,) = examine(trouble="Driver/library version mismatch", tmp_path=tmp_path)
    assert found.level == "missing"


def test_a_driver_that_does_not_answer_does_not_take_the_doctor_with_it() -> None:
    class Hanging(FakeNvml):
        def read(self) -> Any:
            time.sleep(3600)

    begin_s = time.monotonic()
    (found,) = gpu_findings(Hanging, timeout_s=0.2)
    assert time.monotonic() - begin_s < 5
    assert found.level == "missing"
    assert "not answered" in found.found


# The lab


def without(*tools: str) -> Any:
    def which(tool: str, path: str | None = None) -> str | None:
        return None if tool in tools else f"/usr/sbin/{tool}"

    return which


@pytest.mark.parametrize(
    ("tools", "mend"),
    [
        (["ip", "tc", "bridge"], "apt-get install -y iproute2"),
        (["nsenter"], "apt-get install -y util-linux"),
        (["tc", "unshare"], "apt-get install -y iproute2 util-linux"),
    ],
)
def test_missing_tools(monkeypatch: pytest.MonkeyPatch, tools: list[str], mend: str) -> None:
    monkeypatch.setattr(shutil, "which", without(*tools))
    (found,) = lab_findings()
    assert (found.level, found.mend) == ("warning", mend)
    for tool in tools:
        assert tool in found.found


def test_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", without())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (found,) = lab_findings()
    assert (found.level, found.mend) == ("warning", "run `sudo gangline lab ...`")


@pytest.mark.parametrize(
    ("out", "err", "level", "said", "mend"),
    [
        ("made\n", "", "ok", "veth, bridge, tbf, tmpfs", ""),
        ("made\ntbf\nveth\n", "", "warning", "the kernel has no veth, tbf", "modprobe -a veth"),
        ("", "unshare failed: Operation not permitted", "warning", "not permitted", "--privileged"),
        ("", "", "warning", "unshare ended with 1", "--privileged"),
    ],
)
def test_what_the_kernel_can_do(
    monkeypatch: pytest.MonkeyPatch, out: str, err: str, level: str, said: str, mend: str
) -> None:
    monkeypatch.setattr(shutil, "which", without())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    done = subprocess.CompletedProcess([], 0 if out else 1, out, err)
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: done)
    (found,) = lab_findings()
    assert found.level == level
    assert said in found.found
    assert mend in found.mend


@pytest.mark.lab
def test_the_real_probe_sees_a_feature_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0 or not shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        pytest.skip("needs root and iproute2")
    links = Path("/sys/class/net")
    before = sorted(path.name for path in links.iterdir())
    (found,) = lab_findings()
    assert found.level == "ok", found
    added = ("warp", "ip link add glw type warp-drive", "warp_drive")
    monkeypatch.setattr(doctor_machine, "_KERNEL", (*doctor_machine._KERNEL, added))
    (found,) = lab_findings()
    assert (found.level, found.found) == ("warning", "the kernel has no warp")
    assert sorted(path.name for path in links.iterdir()) == before, "it tried in its own namespace"
