"""Fixtures of the monitoring tests: a real MLflow server, a bad proxy, a fresh store."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load_by_path(name: str, path: Path) -> ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, f"{path} can be imported"
    assert spec.loader is not None, f"{path} can be imported"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def outage() -> ModuleType:
    """Return the benchmark's module: `MlflowServer`, `FaultProxy`, `stored_points`."""
    return load_by_path("tracking_outage", ROOT / "benchmarks" / "tracking_outage.py")


@pytest.fixture(scope="session")
def _server(outage: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    server = outage.MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(_server: object) -> object:
    """Return a running MLflow server on loopback, shared; a test that kills it restarts it."""
    return _server


@pytest.fixture
def proxy(outage: ModuleType, server: object) -> Iterator[object]:
    """Return a proxy before the server."""
    proxy = outage.FaultProxy(server.port)  # type: ignore[attr-defined]
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fresh MLflow database; copying it saves each test the creation of its tables."""
    from gangline.monitoring.recording import Tracker
    from gangline.monitoring.uploader_process import drain

    folder = tmp_path_factory.mktemp("template")
    tracker = Tracker(folder / "spool")
    tracker.start_run("template", "template", "template", {}, {})
    tracker.close()
    assert drain(folder / "spool", f"sqlite:///{folder}/mlflow.db", 120, folder) == 0
    return folder / "mlflow.db"


@pytest.fixture
def database(template: Path, tmp_path: Path) -> Path:
    """Return a copy of an empty MLflow database of this test's own."""
    return Path(shutil.copy(template, tmp_path / "mlflow.db"))


@pytest.fixture
def events() -> tuple[list[str], Callable[[str], None]]:
    """Return a list of events and the function that fills it."""
    seen: list[str] = []
    return seen, seen.append
