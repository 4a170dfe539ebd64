"""Which steps of which metrics have been logged, in memory that does not grow with the steps.

A metric is logged every step, or every n-th, so its steps are a few arithmetic runs; what comes out
of order (a hole that a restart fills) is kept one by one.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any


class StepSet:
    """A set of step numbers that are mostly added in rising order."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        # Runs [first, last, stride], disjoint and ascending.
        self._runs: list[list[int]] = [list(run) for run in (state or {}).get("runs", [])]
        self._others: set[int] = set((state or {}).get("others", []))

    def __contains__(self, step: int) -> bool:
        index = bisect_right(self._runs, step, key=lambda run: run[0]) - 1
        if index >= 0:
            first, last, stride = self._runs[index]
            if step <= last and (step - first) % stride == 0:
                return True
        return step in self._others

    def add(self, step: int) -> None:
        """Add a step; adding it twice is the same as once."""
        if step in self:
            return
        last_run = self._runs[-1] if self._runs else None
        if last_run is not None and step <= last_run[1]:
            self._others.add(step)
        elif last_run is not None and last_run[0] == last_run[1]:
            last_run[1:] = [step, step - last_run[0]]
        elif last_run is not None and step == last_run[1] + last_run[2]:
            last_run[1] = step
        else:
            self._runs.append([step, step, 1])

    def state(self) -> dict[str, Any]:
        """Return the set as JSON values, for `StepSet(state)`."""
        return {"runs": self._runs, "others": sorted(self._others)}
