"""NVML with a script in place of GPUs: readings that change, and XIDs, at given times."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gangline.monitoring.nvml import GpuReading, Reading, Xid


@dataclass(frozen=True)
class Change:
    """What happens at `at_s` on one GPU: fields of its reading change, or an XID is reported.

    A field of an NVLink is named `links.INDEX.FIELD`.
    """

    at_s: float
    gpu: int
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    xid: int | None = None


class FakeNvml:
    """Play a timeline. Time stands still but for `advance`; `events` never waits."""

    def __init__(
        self,
        gpus: Sequence[GpuReading] = (),
        script: Sequence[Change] = (),
        *,
        absent: str = "",
        trouble: str = "",
        driver_version: str = "580.82",
        nvml_version: str = "13.580.82",
    ) -> None:
        self._reading = Reading(absent, trouble, driver_version, nvml_version, tuple(gpus))
        if absent or trouble:
            self._reading = Reading(absent=absent, trouble=trouble)
        self._script = sorted(script, key=lambda change: change.at_s)
        self._now_s = 0.0
        self._pending: list[Xid] = []
        self.is_closed = False
        self.advance(0.0)

    def advance(self, seconds: float) -> None:
        """Let so much time pass, with what the script has for it."""
        self._now_s += seconds
        while self._script and self._script[0].at_s <= self._now_s:
            self._apply(self._script.pop(0))

    def read(self) -> Reading:
        """Return all GPUs as they are now."""
        return self._reading

    def events(self, timeout_s: float) -> list[Xid]:
        """Return the XIDs since the last call."""
        found, self._pending = self._pending, []
        return found

    def close(self) -> None:
        """Note that it was closed."""
        self.is_closed = True

    def _apply(self, change: Change) -> None:
        gpus = list(self._reading.gpus)
        gpu = gpus[change.gpu]
        if change.xid is not None:
            self._pending.append(Xid(change.xid, change.gpu, gpu.bus_id))
        for name, value in change.fields.items():
            gpu = _with(gpu, name, value)
        gpus[change.gpu] = gpu
        self._reading = dataclasses.replace(self._reading, gpus=tuple(gpus))


def _with(gpu: GpuReading, name: str, value: Any) -> GpuReading:
    if not name.startswith("links."):
        return dataclasses.replace(gpu, **{name: value})
    _, index, field = name.split(".")
    links = tuple(
        dataclasses.replace(link, **{field: value}) if link.index == int(index) else link
        for link in gpu.links
    )
    return dataclasses.replace(gpu, links=links)
