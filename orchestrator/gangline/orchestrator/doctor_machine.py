"""What the doctor says of GPUs and of the lab: findings from what was read and tried."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from gangline.monitoring.nvml import Nvml, RealNvml, kernel_xids
from gangline.monitoring.nvml_findings import GpuFinding, judge
from gangline.orchestrator.doctor_finding import Finding, Level

_LEVELS: dict[str, Level] = {
    "ok": "ok",
    "absent": "ok",
    "warning": "warning",
    "broken": "missing",
}
_KMSG = Path("/dev/kmsg")
_SBIN = "/usr/sbin:/sbin:/usr/local/sbin"
_PROBE_TIMEOUT_S = 20.0
_NVML_TIMEOUT_S = 30.0
# tool -> the package of Debian and Ubuntu that has it
_TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "bridge": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
# What the kernel must be able to do, each tried in namespaces that end with the try; and the
# module that can be missing.
_KERNEL = (
    ("veth", "ip link add gl0 type veth peer name gl1", "veth"),
    ("bridge", "ip link add glbr type bridge", "bridge"),
    ("tbf", "tc qdisc add dev lo root tbf rate 1mbit burst 10kb latency 50ms", "sch_tbf"),
    ("tmpfs", "mount -t tmpfs none $1", "tmpfs"),
)
_IN_A_CONTAINER = "in a container: docker run --privileged, or add SYS_ADMIN and NET_ADMIN"


def gpu_findings(
    nvml: Callable[[], Nvml] = RealNvml,
    *,
    kernel_log: Path = _KMSG,
    timeout_s: float = _NVML_TIMEOUT_S,
) -> Iterator[Finding]:
    """Yield what NVML and the kernel's log say of the GPUs of this machine."""
    found: list[Finding] = []
    defects: list[Exception] = []

    def look() -> None:
        try:
            found.extend(_look_at_gpus(nvml(), kernel_log))
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that asked
            defects.append(error)

    # A driver whose GPU is gone may never answer; the doctor must.
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(timeout_s)
    if looking.is_alive():
        said = f"the driver has not answered within {timeout_s:g} s"
        yield Finding("gpus", "missing", said, "look at dmesg for NVRM lines; reboot the node")
        return
    if defects:
        raise defects[0]
    yield from found


def _look_at_gpus(nvml: Nvml, kernel_log: Path) -> Iterator[Finding]:
    try:
        reading = nvml.read()
        live, logged = nvml.events(0.0), kernel_xids(reading.gpus, kernel_log)
    finally:
        nvml.close()
    for finding in judge(reading, xids=live):
        yield _translated(finding)
    # What the log tells is past; whether the GPU is well now, the readings tell.
    past = [item for item in judge(reading, xids=logged) if item.rule.startswith("xid")]
    for finding in past:
        said = f"{finding.found}; in the kernel's log since the start of the machine"
        yield _translated(replace(finding, level="warning", found=said))


def _translated(finding: GpuFinding) -> Finding:
    check = "gpus" if finding.gpu is None else f"gpu {finding.gpu}"
    if finding.rule not in ("driver", "gpu"):
        check += f" {finding.rule}"
    if finding.level == "absent":
        return Finding(check, "ok", f"absent ({finding.found}); jobs run on the CPU")
    return Finding(check, _LEVELS[finding.level], finding.found, finding.mend)


def lab_findings() -> Iterator[Finding]:
    """Yield whether this machine can hold a lab of virtual hosts; all else works without."""
    missing = [tool for tool in _TOOLS if _where(tool) is None]
    if missing:
        packages = " ".join(dict.fromkeys(_TOOLS[tool] for tool in missing))
        yield Finding(
            "network lab",
            "warning",
            f"{', '.join(missing)} not found; `gangline lab` needs them, nothing else does",
            f"apt-get install -y {packages}",
        )
        return
    if os.geteuid() != 0:
        yield Finding(
            "network lab",
            "warning",
            "not root; `gangline lab` makes network namespaces, nothing else does",
            "run `sudo gangline lab ...`",
        )
        return
    refused, without = _try_kernel()
    if refused:
        yield Finding("network lab", "warning", f"no namespaces: {refused}", _IN_A_CONTAINER)
    elif without:
        names = [name for name, _, _ in _KERNEL if name in without]
        modules = " ".join(module for name, _, module in _KERNEL if name in without)
        found = f"the kernel has no {', '.join(names)}"
        yield Finding("network lab", "warning", found, f"modprobe -a {modules}")
    else:
        features = ", ".join(name for name, _, _ in _KERNEL)
        yield Finding("network lab", "ok", f"root, iproute2, namespaces, {features}")


def _where(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path=_SBIN)


def _try_kernel() -> tuple[str, set[str]]:
    """Try each feature in namespaces of its own; return why there are none, and what is missing.

    Changes nothing outside: what is made ends with the process that made it.
    """
    script = "".join(
        f"({command}) >/dev/null 2>&1 || echo {name}\n" for name, command, _ in _KERNEL
    )
    unshare = _where("unshare")
    assert unshare is not None, "looked for before"
    namespaces = ["--net", "--mount", "--propagation", "private"]
    with tempfile.TemporaryDirectory(prefix="gangline-doctor-") as folder:
        try:
            tried = subprocess.run(
                [unshare, *namespaces, "sh", "-c", f"echo made\n{script}", "sh", folder],
                capture_output=True,
                text=True,
                timeout=_PROBE_TIMEOUT_S,
                env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{_SBIN}"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"nothing came back within {_PROBE_TIMEOUT_S:.0f} s", set()
    words = tried.stdout.split()
    if words[:1] != ["made"]:
        lines = tried.stderr.strip().splitlines()
        return lines[-1] if lines else f"unshare ended with {tried.returncode}", set()
    return "", set(words[1:])
