"""Track a job in MLflow from behind a spool: a step never waits for a server.

`Tracker` records into the spool and imports no MLflow. `MlflowStore` is the other side, for the
uploader process (`python -m gangline.monitoring.tracker`, started by `spawn_uploader`); its
functions are the only code of the project that imports MLflow.

What MLflow cannot do: the creation of a run has no key of its own, so one that is executed after
its time-out makes a second, empty run. Such runs are removed at the end of the job; one that is
made later still, stays.

How values are stored: a NaN is stored as NaN. MLflow's SQL store cannot hold infinities and keeps
the largest float of that sign (1.8e308) instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from gangline.monitoring.mlflow_limits import (
    MAX_PARAM_CHARS,
    MAX_TAG_CHARS,
    batches,
    dataset_fields,
    safe_key,
    truncate,
)
from gangline.monitoring.recording import Tracker
from gangline.monitoring.uploader_process import UploaderProcess, drain, serve, spawn_uploader

if TYPE_CHECKING:
    from gangline.monitoring.tracking_store import Point, RunSpec

__all__ = ["MlflowStore", "Tracker", "UploaderProcess", "drain", "spawn_uploader"]

# MLflow imports these where it finds them and does without them otherwise, as in its `skinny`
# distribution. Hidden from the uploader they save 86 MiB of memory and 0.4 s of start.
HIDDEN_PACKAGES = ("matplotlib", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "torch")

_STATUS = {
    "RUNNING": "RUNNING",
    "SUCCEEDED": "FINISHED",
    "FAILED": "FAILED",
    "CANCELLED": "KILLED",
}


class MlflowStore:
    """A `TrackingStore` on MLflow's client, for databases and tracking servers.

    Relies on the primary key of MLflow's SQL store over (key, timestamp, step, run, value,
    is_nan): `log_batch` inserts the points of a batch that are missing and passes over the rest.
    """

    def __init__(self, uri: str, artifact_root: Path | None) -> None:
        self._uri = uri
        self._artifact_root = artifact_root
        self._client_: Any = None
        self._experiments: dict[str, str] = {}

    def open_run(self, spec: RunSpec) -> str:
        """Return the run with the tags of `spec`; create it if there is none."""
        with _translated(opening=True):
            found = self._find(spec, f"tags.`gangline.generation` = '{spec.generation}'")
            if found:
                # Two exist when a request was executed after its time-out; one of them is empty.
                return str(min(found, key=lambda r: (_is_empty(r), r.info.run_id)).info.run_id)
            tags = {"gangline.run_id": spec.run_id, "gangline.generation": spec.generation}
            if spec.parent is not None:
                tags["mlflow.parentRunId"] = spec.parent
            run = self._client().create_run(
                self._experiment(spec.experiment),
                start_time=spec.time_ms,
                tags=tags,
                run_name=spec.name,
            )
            return str(run.info.run_id)

    def log_points(self, run: str, points: Sequence[Point]) -> None:
        """Insert points; one that the run has already stays single."""
        from mlflow.entities import Metric

        metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points]
        with _translated():
            self._client().log_batch(run, metrics=metrics, synchronous=True)

    def log_params(self, run: str, params: Mapping[str, str]) -> None:
        """Insert settings that the run lacks; MLflow keeps the first value of a setting.

        One that differs now (the job was resumed with another job file) becomes a tag.
        """
        from mlflow.entities import Param

        wanted = {safe_key(k): truncate(v, MAX_PARAM_CHARS) for k, v in params.items()}
        with _translated():
            present = self._client().get_run(run).data.params
            missing = {k: v for k, v in wanted.items() if k not in present}
            for batch in batches(missing):
                items = [Param(k, v) for k, v in batch.items()]
                self._client().log_batch(run, params=items, synchronous=True)
        changed = {k: v for k, v in wanted.items() if present.get(k, v) != v}
        self.set_tags(run, {f"gangline.resumed_with.{k}": v for k, v in changed.items()})

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags, replacing those of the same name."""
        from mlflow.entities import RunTag

        wanted = {safe_key(k): truncate(str(v), MAX_TAG_CHARS) for k, v in tags.items()}
        if "gangline.git_commit" in wanted:
            wanted["mlflow.source.git.commit"] = wanted["gangline.git_commit"]
        with _translated():
            for batch in batches(wanted):
                items = [RunTag(k, v) for k, v in batch.items()]
                self._client().log_batch(run, tags=items, synchronous=True)

    def log_dataset(self, run: str, dataset: Mapping[str, object]) -> None:
        """Record the training data as an input of the run."""
        if not dataset:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", "training")]
        item = DatasetInput(Dataset(**dataset_fields(dataset)), tags=tags)
        with _translated():
            self._client().log_inputs(run, [item])

    def log_artifact(self, run: str, path: Path, artifact_dir: str) -> None:
        """Copy a file or folder into the artifacts of the run."""
        with _translated():
            self._client().log_artifact(run, str(path), artifact_dir or None)

    def set_status(self, run: str, status: str, time_ms: int | None) -> None:
        """Set the status; an end has a time."""
        with _translated():
            if time_ms is None:
                self._client().update_run(run, status=_STATUS[status])
            else:
                self._client().set_terminated(run, _STATUS[status], time_ms)

    def remove_duplicates(self, spec: RunSpec, keep: Sequence[str]) -> int:
        """Delete runs of the job that hold nothing and are not in `keep`."""
        with _translated():
            others = [r for r in self._find(spec) if r.info.run_id not in keep]
            empty = [run for run in others if _is_empty(run)]
            for run in empty:
                self._client().delete_run(run.info.run_id)
        return len(empty)

    def _find(self, spec: RunSpec, condition: str = "") -> list[Any]:
        query = f"tags.`gangline.run_id` = '{spec.run_id}'"
        return list(
            self._client().search_runs(
                [self._experiment(spec.experiment)],
                f"{query} and {condition}" if condition else query,
                max_results=1000,
            )
        )

    def _experiment(self, name: str) -> str:
        """Return the id of the experiment, creating it if need be."""
        if name not in self._experiments:
            found = self._client().get_experiment_by_name(name)
            if found is not None:
                self._experiments[name] = found.experiment_id
            else:
                root = self._artifact_root
                location = None if root is None else (root / quote(name, safe="")).as_uri()
                self._experiments[name] = self._client().create_experiment(name, location)
        return self._experiments[name]

    def _client(self) -> Any:
        if self._client_ is None:
            from mlflow.tracking import MlflowClient

            if self._uri.startswith("sqlite:"):
                _create_database(Path(urlsplit(self._uri).path[1:]))
            self._client_ = MlflowClient(self._uri)
        return self._client_


def _create_database(path: Path) -> None:
    """Let MLflow create its tables beside `path`, then move the file there.

    In place, two processes at once disturb each other (6 of 6 tries), and one that is killed
    meanwhile leaves a database that MLflow can never open again (7 of 14).
    """
    from filelock import FileLock
    from mlflow.tracking import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return
        new = path.with_name(f"{path.name}.new")
        for leftover in path.parent.glob(f"{new.name}*"):
            leftover.unlink()
        MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
        os.replace(new, path)


def _is_empty(run: Any) -> bool:
    return not run.data.metrics and not run.data.params


@contextmanager
def _translated(*, opening: bool = False) -> Iterator[None]:
    """Turn MLflow's errors into the tree of `gangline.monitoring.tracking_store`.

    What goes wrong while a run is `opening` is tried again whatever it is: to refuse the run would
    be to refuse all its points.
    """
    from mlflow.exceptions import MlflowException

    from gangline.monitoring.tracking_store import (
        RecordRefusedError,
        RunLostError,
        StoreUnavailableError,
    )

    try:
        yield
    except MlflowException as error:
        text = f"{error.error_code}: {error.message}"
        deleted = "must be in the 'active' state" in text
        if not opening and (error.error_code == "RESOURCE_DOES_NOT_EXIST" or deleted):
            raise RunLostError(text) from error
        if not opening and error.error_code == "INVALID_PARAMETER_VALUE":
            raise RecordRefusedError(text) from error
        raise StoreUnavailableError(text) from error
    # Drivers and artifact stores raise their own kinds, which cannot be listed here.
    except Exception as error:
        raise StoreUnavailableError(f"{type(error).__name__}: {error}") from error


def main(arguments: Sequence[str]) -> int:
    """Run the uploader of one spool until its parent goes; see `spawn_uploader`."""
    for name in HIDDEN_PACKAGES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    return serve(arguments, MlflowStore)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
