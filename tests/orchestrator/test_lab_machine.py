"""What a machine without labs is told. Needs no root."""

import os
import subprocess
import sys

import pytest

from gangline.orchestrator import lab, lab_links


def test_not_root_is_one_line_with_the_mend(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert lab.why_no_lab() == "a lab needs root, for network namespaces; run it with sudo"


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(lab, "tool", lambda name: None if name == "tc" else "/sbin/ip")
    assert lab.why_no_lab() == "a lab needs tc; install iproute2"


def test_tools_outside_the_path_are_found(monkeypatch):
    if lab_links.tool("ip") is None:
        pytest.skip("iproute2 is not installed")
    lab_links.tool.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    assert lab_links.tool("ip") is not None


def test_the_command_says_the_same_and_ends_with_1(tmp_path):
    """Without root, or with it but without the right to make namespaces."""
    (tmp_path / "lab.yaml").write_text("hosts: 2\n")
    command = [sys.executable, "-m", "gangline.orchestrator.cli", "lab", "up", "lab.yaml"]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *command]
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("gangline: a lab needs ")
    assert not (tmp_path / "state").exists()


def test_the_plan_is_printed_without_root(tmp_path):
    (tmp_path / "lab.yaml").write_text("hosts: 2\nfabric: {kind: leaf_spine, planes: 2}\n")
    command = [sys.executable, "-m", "gangline.orchestrator.cli", "lab", "plan", "lab.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0].split()
    assert first[:2] == ["host0", "sysctl"]
    assert "leaf1.1   ip route replace 10.78.0.0/24 nexthop via 10.88.1.1 dev s0" in done.stdout
