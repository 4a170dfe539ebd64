from __future__ import annotations

import pytest
from pydantic import ValidationError

from gangline.monitoring.config import TrackingConfig
from gangline.monitoring.redaction import redact_text, redact_uri, secrets_of

CANARY = "s3cr3tCanary"


@pytest.mark.parametrize(
    ("uri", "secret"),
    [
        (f"http://user:{CANARY}@host:5000/path", CANARY),
        (f"https://{CANARY}@host", CANARY),
        (f"postgresql://user:{CANARY}@host/db?sslmode=require", CANARY),
        (f"http://host/?token={CANARY}", CANARY),
        (f"postgresql://user:{CANARY}%40x@host/db", f"{CANARY}%40x"),
        (f"postgresql://user:{CANARY}%40x@host/db", f"{CANARY}@x"),
    ],
)
def test_no_secret_is_left(uri, secret):
    assert CANARY not in redact_uri(uri)
    assert "host" in redact_uri(uri)
    text = f"API request to {uri} failed for {secret}"
    assert CANARY not in redact_text(text, secrets_of(uri))


def test_what_is_no_uri_is_masked_whole():
    assert CANARY not in redact_uri(f"http://[broken?{CANARY}")
    assert CANARY not in redact_text(f"bad http://[x?{CANARY}", secrets_of(f"http://[x?{CANARY}"))


def test_plain_uris_stay():
    for uri in ("sqlite:////abs/mlflow.db", "sqlite:///rel.db", "http://127.0.0.1:5000"):
        assert redact_uri(uri) == uri
        assert secrets_of(uri) == []


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", f"ftp://user:{CANARY}@host"])
def test_stores_that_would_double_points_are_refused(uri):
    with pytest.raises(ValidationError, match="sqlite:///") as caught:
        TrackingConfig(uri=uri)
    assert CANARY not in str(caught.value)


def test_defaults_and_unknown_fields():
    config = TrackingConfig()
    assert config.enabled
    assert config.uri is None
    assert TrackingConfig(uri="postgresql+psycopg2://h/db").uri == "postgresql+psycopg2://h/db"
    with pytest.raises(ValidationError, match="extra"):
        TrackingConfig(url="http://h")  # type: ignore[call-arg]
    for field in TrackingConfig.model_fields.values():
        assert field.description
