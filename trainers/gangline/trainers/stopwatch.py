"""Divide the wall time of a step into named parts."""

import time


class Stopwatch:
    """Run from its making; each lap ends a part. On a GPU a part is when it was queued."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.parts_s: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        now = time.perf_counter()
        self.parts_s[part] = self.parts_s.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        """Return the time from the start to the last lap."""
        return self._last - self._started
