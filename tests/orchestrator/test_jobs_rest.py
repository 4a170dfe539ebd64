"""The client of Ray's job API: each way to fail is one error with one clear line."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gangline.orchestrator.errors import (
    AuthError,
    ClusterError,
    GanglineError,
    NotFoundError,
    UnreachableError,
    UsageError,
)
from gangline.orchestrator.jobs_rest import (
    DEFAULT_ADDRESS,
    JobsRest,
    Token,
    crosses_network_in_clear,
    find_address,
    find_token,
)

from .fake_head import SECRET, TOKEN, FakeHead


@pytest.fixture
def head() -> Iterator[FakeHead]:
    fake = FakeHead()
    yield fake
    fake.close()


@pytest.fixture
def no_token_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def assert_one_clear_line(error: GanglineError) -> None:
    text = str(error)
    assert "\n" not in text
    assert SECRET not in text
    assert "Traceback" not in text


def test_a_missing_token_is_said(head: FakeHead) -> None:
    with pytest.raises(AuthError, match=r"token missing.*--token-file") as caught:
        JobsRest(head.address, None).version()
    assert caught.value.exit_code == 4
    assert_one_clear_line(caught.value)


def test_a_wrong_token_is_said_with_its_source_and_without_itself(head: FakeHead) -> None:
    with pytest.raises(AuthError, match=r"token refused .*\(from RAY_AUTH_TOKEN\)") as caught:
        JobsRest(head.address, Token("wrong-token", "RAY_AUTH_TOKEN")).jobs()
    assert "wrong-token" not in str(caught.value)


def test_a_head_that_is_not_there_is_unreachable() -> None:
    with pytest.raises(UnreachableError, match=r"cannot reach .*connection refused") as caught:
        JobsRest(f"http://127.0.0.1:{free_port()}", TOKEN).version()
    assert caught.value.exit_code == 4
    assert_one_clear_line(caught.value)


def test_an_unknown_host_is_unreachable() -> None:
    with pytest.raises(UnreachableError, match="unknown host"):
        JobsRest("http://no-such-host.invalid:8265", TOKEN).version()


def test_a_head_that_does_not_accept_is_given_up_in_time() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        # Fill the queue of connections, so that one more gets no answer at all.
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        start_s = time.monotonic()
        with pytest.raises(UnreachableError, match="no answer in time"):
            JobsRest(f"http://127.0.0.1:{address[1]}", TOKEN, connect_timeout_s=0.3).version()
        assert time.monotonic() - start_s < 5.0
        for each in waiting:
            each.close()


@pytest.mark.parametrize("body", [b"<html>not ray</html>", b"[]", b"\xff\xfe", b""])
def test_an_answer_that_is_not_rays_is_said(head: FakeHead, body: bytes) -> None:
    head.answers["/api/version"] = (200, body)
    with pytest.raises(ClusterError, match="does not answer like a Ray dashboard"):
        JobsRest(head.address, TOKEN).version()


def test_of_an_inner_error_only_the_last_line_is_told(head: FakeHead) -> None:
    body = b"Traceback (most recent call last):\n  File x\nRuntimeError: no agent\n"
    head.answers["/api/jobs/j/stop"] = (500, body)
    with pytest.raises(ClusterError, match=r"answered 500 .*: RuntimeError: no agent") as caught:
        JobsRest(head.address, TOKEN).stop("j")
    assert_one_clear_line(caught.value)


def test_a_redirect_is_not_followed(head: FakeHead) -> None:
    head.answers["/api/version"] = (302, b"")
    with pytest.raises(ClusterError, match="302"):
        JobsRest(head.address, TOKEN).version()


def test_no_such_job_is_not_found(head: FakeHead) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        JobsRest(head.address, TOKEN).job("x")


def test_ids_are_quoted(head: FakeHead) -> None:
    with pytest.raises(NotFoundError):
        JobsRest(head.address, TOKEN).logs("../a b?c")
    assert head.seen == [("GET", "/api/jobs/..%2Fa%20b%3Fc/logs")]


def test_what_ray_says_is_understood(head: FakeHead) -> None:
    rest = JobsRest(head.address, TOKEN)
    head.says("/api/version", {"ray_version": "2.60.0"})
    head.says("/api/jobs/", [{"submission_id": "a", "status": "RUNNING"}, {"submission_id": None}])
    head.says("/api/jobs/a/logs", {"logs": "text\n"})
    head.says("/api/jobs/a/stop", {"stopped": True})
    head.says("/api/v0/cluster_metadata", {"data": {"pythonVersion": "3.11.7"}})
    assert rest.version() == "2.60.0"
    assert list(rest.jobs()) == ["a"]
    assert rest.logs("a") == "text\n"
    assert rest.stop("a") is True
    assert head.seen[-1] == ("POST", "/api/jobs/a/stop")
    assert rest.python_version() == "3.11.7"


def test_the_heads_own_python_is_found(head: FakeHead) -> None:
    node = {"node_id": "n1", "is_head_node": True, "state": "ALIVE", "resources_total": {"CPU": 2}}
    dead = {"node_id": "n2", "state": "DEAD", "resources_total": {"CPU": 8}}
    nodes = {"data": {"result": {"result": [dead, node]}}}
    head.says("/api/v0/nodes?detail=1&limit=10000", nodes)
    command = ["raylet", "--python_worker_command=/opt/venv/bin/python3 /x/setup_worker.py -u"]
    head.says("/nodes/n1", {"data": {"detail": {"cmdline": command}}})
    rest = JobsRest(head.address, TOKEN)
    assert rest.head_python() == "/opt/venv/bin/python3"
    assert rest.node_resources() == [{"CPU": 2}]
    head.says("/nodes/n1", {"data": {"detail": {"cmdline": ["raylet"]}}})
    assert rest.head_python() is None


@pytest.mark.usefixtures("no_token_around")
def test_tokens_are_looked_for_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_token(None) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert find_token(None) == Token("home", str(tmp_path / ".ray" / "auth_token"))
    (tmp_path / "path").write_text(" path ")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "path"))
    assert find_token(None) == Token("path", "RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert find_token(None) == Token("variable", "RAY_AUTH_TOKEN")
    (tmp_path / "given").write_text("given")
    assert find_token(str(tmp_path / "given")) == Token("given", "--token-file")


@pytest.mark.usefixtures("no_token_around")
@pytest.mark.parametrize("content", [None, b"", b"\n", b"a\nb", b"\xff\xfe"])
def test_a_token_file_without_a_token_is_said(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    with pytest.raises(AuthError, match="token missing"):
        find_token(str(tmp_path / "t"))


def test_a_token_is_in_no_text_made_of_it() -> None:
    assert SECRET not in repr(TOKEN)
    assert SECRET not in f"{TOKEN}"


@pytest.mark.usefixtures("no_token_around")
def test_addresses_are_looked_for_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_address(None) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://env:1")
    assert find_address(None) == "http://env:1"
    assert find_address("https://head:8265/") == "https://head:8265"
    assert find_address("head:8265") == "http://head:8265"
    assert find_address("http://[::1]:8265/ray/") == "http://[::1]:8265/ray"


@pytest.mark.parametrize(
    "address",
    [
        "ray://head:10001",
        "file:///etc/passwd",
        "http://user:pw@head:8265",
        "http://head:99999999",
        "http://head:port",
        "http://",
        "http://head/?x=1",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_address(address)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "clear"),
    [
        ("http://head:8265", True),
        ("https://head:8265", False),
        ("http://127.0.0.1:8265", False),
        ("http://[::1]:8265", False),
    ],
)
def test_a_token_in_clear_on_a_network_is_noticed(address: str, clear: bool) -> None:
    assert crosses_network_in_clear(address, TOKEN) is clear
    assert not crosses_network_in_clear(address, None)
