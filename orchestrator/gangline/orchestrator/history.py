"""The table of all jobs started from this runs folder: `jobs.sqlite`.

What it is for: names and places. A job's live state is in its run folder or on its cluster, and
`reconcile` (reconcile.py) brings it here; the table can be rebuilt from the run folders.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from gangline.orchestrator.errors import GanglineError, NotFoundError
from gangline.orchestrator.runs import RUN_ID_PATTERN

SCHEMA_VERSION = 1
FILE_NAME = "jobs.sqlite"
_BUSY_TIMEOUT_S = 10.0

Mode = Literal["run", "submit"]
TERMINAL_STATES = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})


@dataclass(frozen=True)
class JobRow:
    """One job as the table knows it. Times are unix seconds.

    `mode` run: `driver_pid` and `driver_start` (the kernel's start time, which tells a process
    from a later one of its pid) are the process on `host` that drives it. `mode` submit:
    `address` and `submission_id` name the Ray job, `token_file` is where its token lies (the
    token itself is never stored). A status file that is not newer than `status_after` speaks of
    an earlier attempt (its own clock, which may be another machine's, is compared with itself).
    `job` is the resolved job of the newest attempt as JSON, kept where the run folder is not here.
    """

    run_id: str
    name: str
    kind: str
    mode: Mode
    state: str
    created_at: float
    status_after: float
    run_dir: str
    reason: str = ""
    updated_at: float = 0.0
    address: str | None = None
    submission_id: str | None = None
    token_file: str | None = None
    user: str = ""
    host: str = ""
    driver_pid: int | None = None
    driver_start: str | None = None
    num_resumes: int = 0
    job: str | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether the stored state is one that a job does not leave by itself."""
        return self.state in TERMINAL_STATES


_COLUMNS = tuple(field.name for field in fields(JobRow))
_CREATE = """
CREATE TABLE jobs (
  run_id TEXT PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL,
  mode TEXT NOT NULL CHECK (mode IN ('run', 'submit')), state TEXT NOT NULL,
  created_at REAL NOT NULL, status_after REAL NOT NULL, run_dir TEXT NOT NULL,
  reason TEXT NOT NULL, updated_at REAL NOT NULL, address TEXT, submission_id TEXT,
  token_file TEXT, user TEXT NOT NULL, host TEXT NOT NULL, driver_pid INTEGER,
  driver_start TEXT, num_resumes INTEGER NOT NULL, job TEXT
)
"""


def new_row(run_id: str, *, name: str, kind: str, mode: Mode, run_dir: Path) -> JobRow:
    """Return the row of a job that starts now, on this host, by this user."""
    now = time.time()
    return JobRow(
        run_id=run_id,
        name=name,
        kind=kind,
        mode=mode,
        state="QUEUED" if mode == "submit" else "STARTING",
        created_at=now,
        status_after=0.0,
        updated_at=now,
        run_dir=str(run_dir),
        user=_user(),
        host=socket.gethostname(),
    )


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run under a uid that has no name
        return str(os.getuid())


class History:
    """The table in `<root>/jobs.sqlite`.

    Reading makes no file. Many processes may use it at once: each change is one transaction, and
    a second writer waits for the first.

    Raises, in every method: GanglineError with the mend when the file is damaged, locked for
    longer than 10 s, or of a newer version.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / FILE_NAME
        self._connection: sqlite3.Connection | None = None

    def add(self, row: JobRow) -> None:
        """Insert a new job."""
        marks = ", ".join(f":{column}" for column in _COLUMNS)
        with self._writing() as db:
            db.execute(f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({marks})", asdict(row))  # noqa: S608 - as below

    def update(self, run_id: str, **changes: Any) -> JobRow:
        """Change some columns of a job, stamp `updated_at`, and return the row as it is now.

        Raises: NotFoundError when there is no such row.
        """
        with self._writing() as db:
            return _set(db, run_id, changes)

    def begin_attempt(self, row: JobRow, **changes: Any) -> JobRow:
        """Count one more attempt of a job and change some columns with it.

        Raises: GanglineError when somebody else began one since `row` was read.
        """
        with self._writing() as db:
            now = _one(db, row.run_id)
            if now.num_resumes != row.num_resumes or not (now.is_terminal or row == now):
                raise GanglineError(
                    f"{row.run_id} was just resumed by another process; follow it with "
                    f"`gangline logs -f {row.run_id}`"
                )
            return _set(db, row.run_id, {**changes, "num_resumes": row.num_resumes + 1})

    def get(self, run_id: str) -> JobRow:
        """Return one job by its whole run id.

        Raises: NotFoundError.
        """
        with self._reading() as db:
            if db is None:
                raise NotFoundError(f"no job {run_id!r}: {self.path} does not exist yet")
            return _one(db, run_id)

    def rows(self) -> list[JobRow]:
        """Return every job, the newest first."""
        with self._reading() as db:
            if db is None:
                return []
            found = db.execute("SELECT * FROM jobs ORDER BY created_at DESC, run_id")
            return [_to_row(row) for row in found]

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        with self._explained():
            if self._connection is None and not self.path.exists() and not self._has_run_folders():
                yield None
                return
            yield self._connect()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._explained():
            self.root.mkdir(parents=True, exist_ok=True)
            db = self._connect()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        db = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        try:
            db.row_factory = sqlite3.Row
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._create(db)
            elif version > SCHEMA_VERSION:
                raise GanglineError(
                    f"{self.path} has version {version} and this Gangline knows "
                    f"{SCHEMA_VERSION}; use the newer Gangline, or another --runs folder"
                )
        except BaseException:
            db.close()
            raise
        self._connection = db
        return db

    def _create(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")  # the first of several new processes makes the table
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            db.execute(_CREATE)
            for row in _rows_of_folders(self.root):
                marks = ", ".join("?" * len(_COLUMNS))
                db.execute(f"INSERT INTO jobs VALUES ({marks})", _in_table_order(db, row))  # noqa: S608 - question marks only
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")

    def _has_run_folders(self) -> bool:
        return next(_rows_of_folders(self.root), None) is not None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            mend = "check the disk and who may write there, or choose another --runs folder"
            if "locked" in str(error):
                mend = "another process holds it; try again when that is done"
            raise GanglineError(f"cannot use the job table {self.path}: {error}; {mend}") from error
        except sqlite3.IntegrityError as error:
            raise GanglineError(f"the job table {self.path} refused a row: {error}") from error
        except sqlite3.DatabaseError as error:
            raise GanglineError(
                f"the job table {self.path} is damaged ({error}); move it away (mv {self.path} "
                f"{self.path}.damaged): the next command rebuilds it from the run folders"
            ) from error


def _one(db: sqlite3.Connection, run_id: str) -> JobRow:
    found = db.execute("SELECT * FROM jobs WHERE run_id = ?", (run_id,)).fetchone()
    if found is None:
        raise NotFoundError(f"no job {run_id!r}; see `gangline ls --all`")
    return _to_row(found)


def _set(db: sqlite3.Connection, run_id: str, changes: dict[str, Any]) -> JobRow:
    unknown = set(changes) - set(_COLUMNS)
    assert not unknown, f"columns {unknown} are not in the table"
    changes = {"updated_at": time.time(), **changes}
    assignments = ", ".join(f"{column} = :{column}" for column in changes)
    db.execute(
        f"UPDATE jobs SET {assignments} WHERE run_id = :key",  # noqa: S608 - our own column names
        {**changes, "key": run_id},
    )
    return _one(db, run_id)


def _to_row(found: sqlite3.Row) -> JobRow:
    return JobRow(**{column: found[column] for column in _COLUMNS})


def _in_table_order(db: sqlite3.Connection, row: JobRow) -> list[Any]:
    values = asdict(row)
    return [values[name] for (_, name, *_) in db.execute("PRAGMA table_info(jobs)")]


def _rows_of_folders(root: Path) -> Iterator[JobRow]:
    """Yield a row for each run folder in `root`, from its status file."""
    if not root.is_dir():
        return
    for folder in sorted(root.iterdir()):
        if folder.is_symlink() or not RUN_ID_PATTERN.fullmatch(folder.name):
            continue
        status = status_of(folder)
        if status is None:
            continue
        row = new_row(
            folder.name,
            name=str(status.get("name") or folder.name.rpartition("-")[0] or folder.name),
            kind=str(status.get("kind", "train")),
            mode="run",
            run_dir=folder.resolve(),
        )
        state = str(status.get("state", "FAILED"))
        yield replace(row, created_at=_first_event_s(folder), state=state)


def _first_event_s(folder: Path) -> float:
    try:
        with open(folder / "journal.jsonl", "rb") as journal:
            return float(json.loads(journal.readline())["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.stat().st_mtime


def status_of(run_dir: Path) -> dict[str, Any] | None:
    """Return the newest status of a run, or None where there is none that can be read."""
    try:
        status = json.loads((run_dir / "status.json").read_bytes())
    except (OSError, ValueError):
        # A run that has not written one, or a folder of another machine: the callers show the
        # stored state instead.
        return None
    return status if isinstance(status, dict) else None
