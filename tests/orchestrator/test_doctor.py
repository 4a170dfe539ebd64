"""The doctor finds what is wrong, names the mend, and survives what it examines."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gangline.orchestrator import doctor
from gangline.orchestrator.doctor import Finding


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_every_finding_that_is_not_ok_has_a_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The imports take seconds and have tests of their own.
    monkeypatch.setattr(doctor, "_REQUIRED_IMPORTS", ())
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    findings = list(doctor.examine(tmp_path))
    assert len({finding.check for finding in findings}) == len(findings) >= 9
    for finding in findings:
        assert finding.level == "ok" or finding.mend, finding


def test_a_package_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_REQUIRED_IMPORTS", ("json", "no_such_package"))
    good, bad = doctor._imports()
    assert good.level == "ok"
    assert bad.level == "missing"
    assert "ModuleNotFoundError" in bad.found
    assert "pip install" in bad.mend


def test_a_package_that_hangs_at_import_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hanging.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_REQUIRED_IMPORTS", ("hanging",))
    monkeypatch.setattr(doctor, "_IMPORT_TIMEOUT_S", 0.5)
    finding = only(doctor._imports())
    assert finding.level == "missing"
    assert "still importing" in finding.found


def test_wrong_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["pydantic>=99", "no-such-package>=1", "rich>=14", "pytest>=99; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: asked)
    finding = only(doctor._packages())
    assert finding.level == "missing"
    assert "pydantic" in finding.found
    assert "no-such-package (wanted >=1)" in finding.found
    assert "rich" not in finding.found
    assert "pytest" not in finding.found


def test_an_old_python_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_MIN_PYTHON", (9, 9))
    assert only(doctor._python()).level == "missing"


@pytest.mark.parametrize("limit", ["_MIN_MEMORY_BYTES", "_MIN_SHM_BYTES"])
def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(doctor, limit, 2**60)
    assert "warning" in {finding.level for finding in doctor._processor_and_memory()}


def test_a_full_disk_is_a_warning_and_a_new_folder_is_judged_by_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert only(doctor._disk(tmp_path / "a" / "b" / "runs")).level == "ok"
    monkeypatch.setattr(doctor, "_MIN_DISK_BYTES", 2**60)
    assert only(doctor._disk(tmp_path)).level == "warning"


def test_a_folder_that_cannot_be_written_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert only(doctor._disk(tmp_path)).level == "missing"


def test_a_cluster_is_asked_only_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert only(doctor._cluster(None)).level == "ok"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finding = only(doctor._cluster(f"http://127.0.0.1:{port}"))
    assert finding.level == "missing"
    assert "cannot reach" in finding.found
    assert finding.mend
