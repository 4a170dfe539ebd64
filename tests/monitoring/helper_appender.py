"""Append steps from `first` on until killed; print each step once it is durable."""

from __future__ import annotations

import sys
from pathlib import Path

from gangline.monitoring.recording import Tracker


def main() -> None:
    spool, generation, first = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    tracker = Tracker(spool)
    tracker.start_run("kill-test", "kill", None, {}, {})
    tracker.start_attempt(generation)
    for step in range(first, 10**9):
        # The value says which attempt computed it: the first one to record a step wins.
        values = {"train/loss": step + generation / 1000, "train/lr": float(step)}
        assert tracker.log_metrics(step, values, generation=generation)
        sys.stdout.write(f"{step}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
