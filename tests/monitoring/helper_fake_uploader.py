"""An uploader process whose store is a small SQLite file instead of MLflow; for the kill tests.

`table points` has the primary key that MLflow's has; `table sends` has none, so that it shows how
often points were sent. Pauses before and after each commit make it likely that SIGKILL hits there.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gangline.monitoring.tracking_store import Point, RunSpec
from gangline.monitoring.uploader_process import serve

PAUSE_S = 0.01


class SqliteStore:
    """A `TrackingStore` in the file that the URI names."""

    def __init__(self, uri: str, artifact_root: Path | None) -> None:
        self._connection = sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=30)
        self._connection.execute("pragma synchronous = off")
        self._connection.executescript(
            "create table if not exists runs(id integer primary key, generation text);"
            "create table if not exists points(run text, key text, step integer, time integer,"
            " value real, primary key (run, key, step, time, value));"
            "create table if not exists sends(run text, key text, step integer);"
        )

    def open_run(self, spec: RunSpec) -> str:
        found = self._connection.execute(
            "select min(id) from runs where generation = ?", (spec.generation,)
        ).fetchone()[0]
        if found is None:
            time.sleep(PAUSE_S)
            with self._connection:
                self._connection.execute(
                    "insert into runs(generation) values (?)", (spec.generation,)
                )
            time.sleep(PAUSE_S)
            return self.open_run(spec)
        return str(found)

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        time.sleep(PAUSE_S)
        rows = [(run, p.key, p.step, p.time_ms, p.value) for p in points]
        with self._connection:
            self._connection.executemany("insert or ignore into points values (?,?,?,?,?)", rows)
            self._connection.executemany("insert into sends values (?,?,?)", [r[:3] for r in rows])
        time.sleep(PAUSE_S)

    def log_params(self, run: str, params: Mapping[str, str]) -> None:
        pass

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        pass

    def log_dataset(self, run: str, dataset: Mapping[str, object]) -> None:
        pass

    def log_artifact(self, run: str, path: Path, artifact_dir: str) -> None:
        pass

    def set_status(self, run: str, status: str, time_ms: int | None) -> None:
        pass

    def remove_duplicates(self, spec: RunSpec, keep: Sequence[str]) -> int:
        return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], SqliteStore))
