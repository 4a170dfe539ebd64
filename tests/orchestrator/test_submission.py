"""What is sent to a cluster, and what is checked before: no cluster is needed for these."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.orchestrator.plan_fit import cluster_of
from gangline.orchestrator.submission import (
    Submission,
    entry_point,
    stage_archive,
    stage_package,
    take_environment,
)


def a_submission(**fields: Any) -> Submission:
    given: dict[str, Any] = {
        "submission_id": "moe-aaaaaa",
        "run_id": "moe-aaaaaa",
        "job": {"kind": "train", "name": "moe"},
        "run_dir": Path("/disk/runs/moe-aaaaaa"),
        "files": {},
        "grace_s": 10.0,
        "env": {},
    }
    return Submission(**{**given, **fields})


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_no_folder_name_gets_out_of_its_place_in_the_command(name: str) -> None:
    run_dir = Path("/runs") / name.replace("/", "_")
    words = shlex.split(entry_point("/opt/py thon/bin/python3", run_dir))
    assert words[:3] == ["/opt/py thon/bin/python3", "-m", "gangline.orchestrator.driver"]
    assert words[3:] == ["--job", "job.json", "--run-dir", str(run_dir)]


def test_the_package_is_whole_and_importable_from_one_folder(tmp_path: Path) -> None:
    package = stage_package(tmp_path)
    rooms = {path.name for path in package.iterdir()}
    assert {"orchestrator", "trainers", "comm", "monitoring", "kernels"} <= rooms
    assert not list(package.rglob("*.pyc"))
    assert not list(package.rglob("__pycache__"))
    code = "import gangline.orchestrator.errors as m, gangline.trainers.config as c; "
    code += "print(m.__file__); print(c.__file__)"
    # -S leaves out site-packages' .pth files, which put the checkout on the path.
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{site_packages()}"},
        capture_output=True,
        text=True,
        check=True,
    )
    for line in found.stdout.splitlines():
        assert line.startswith(str(package))


def site_packages() -> str:
    import pydantic

    return str(Path(pydantic.__file__).parent.parent)


def test_the_archive_holds_the_job_and_the_files_byte_for_byte(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_bytes(b"print(1)\r\n\xff")
    ignored = tmp_path / ".gitignore"
    ignored.write_text("*")
    script.chmod(0o755)
    files = {"train.py": script, "sub/.gitignore": ignored}
    archive = stage_archive(tmp_path / "job.zip", a_submission(files=files))
    with zipfile.ZipFile(archive) as opened:
        assert set(opened.namelist()) == {"job.json", "train.py", "sub/.gitignore"}
        assert opened.read("train.py") == b"print(1)\r\n\xff"
        assert json.loads(opened.read("job.json")) == {"kind": "train", "name": "moe"}
        assert opened.getinfo("train.py").external_attr >> 16 == 0o755


def test_equal_jobs_give_equal_archives(tmp_path: Path) -> None:
    first = stage_archive(tmp_path / "1.zip", a_submission(job={"a": 1, "b": 2}))
    second = stage_archive(tmp_path / "2.zip", a_submission(job={"b": 2, "a": 1}))
    assert first.read_bytes() == second.read_bytes()


def test_variables_travel_in_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = stage_archive(tmp_path / "1.zip", a_submission(env={"GANGLINE_TEST_TOKEN": "x"}))
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "there")
        assert b"GANGLINE_TEST_TOKEN" not in opened.read("job.json")
    monkeypatch.delenv("GANGLINE_TEST_TOKEN", raising=False)
    take_environment(tmp_path / "there" / "job.json")
    assert os.environ["GANGLINE_TEST_TOKEN"] == "x"
    monkeypatch.delenv("GANGLINE_TEST_TOKEN")
    take_environment(tmp_path / "job.json")  # no such file beside it
    assert "GANGLINE_TEST_TOKEN" not in os.environ


def test_rays_nodes_are_translated_for_the_plan() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0, "memory": 8e9, "node:10.0.0.1": 1.0}, {"object_store": 1.0}]
    first, second = cluster_of(nodes).nodes
    assert (first.num_cpus, first.num_gpus, first.memory_bytes) == (4.0, 1.0, 8_000_000_000)
    assert (second.num_cpus, second.num_gpus, second.memory_bytes) == (0.0, 0.0, None)
