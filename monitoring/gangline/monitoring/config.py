"""The `tracking` section of a job file."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gangline.monitoring.redaction import redact_uri

# Stores with a primary key over (run, metric, step, time, value): sending a point twice is safe.
SUPPORTED_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")


def check_tracking_uri(uri: str) -> str:
    """Return the URI if points can be delivered to it exactly once.

    Raises: ValueError, without printing credentials.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in SUPPORTED_SCHEMES:
        raise ValueError(
            f"tracking.uri {redact_uri(uri)!r} has the scheme {scheme!r}; wanted one of "
            f"{', '.join(SUPPORTED_SCHEMES)}. MLflow's file store would double points that are "
            "sent again; use sqlite:///path/to/mlflow.db for a local store"
        )
    return uri


class TrackingConfig(BaseModel):
    """Say where the metrics of a job go."""

    # A refused URI may hold a password: errors must not quote it.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    enabled: bool = Field(
        default=True, description="send metrics, settings and artifacts to MLflow"
    )
    uri: Annotated[str, AfterValidator(check_tracking_uri)] | None = Field(
        default=None,
        description="MLflow tracking server or database; none: sqlite in the folder of the runs",
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        max_length=250,
        description="MLflow experiment; none: gangline",
    )
    spool_cap_bytes: int = Field(
        default=256 * 2**20,
        ge=2**20,
        description="most bytes that wait on disk while the server is down; then points are "
        "dropped and counted",
    )
