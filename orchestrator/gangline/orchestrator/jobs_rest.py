"""A small client of Ray's job REST API, over plain http.client.

It needs no ray, whose import alone takes longer than most commands may. Every call has a short
time-out, and every failure is one of three: nothing answers, the token is missing or refused, or
the answer is not what Ray says.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from gangline.orchestrator.errors import (
    AuthError,
    ClusterError,
    NotFoundError,
    UnreachableError,
    UsageError,
)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_TIMEOUT_S = 2.0
# Ray's head forwards a request to an agent, which may be busy starting workers.
_READ_TIMEOUT_S = 30.0
_MAX_ANSWER_BYTES = 512 * 2**20
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

Json = dict[str, Any]


@dataclass(frozen=True)
class Token:
    """A cluster's token and where it was found; the token is in no text made of this."""

    value: str = field(repr=False)
    source: str


def find_address(address: str | None) -> str:
    """Return the base URL of the job API: the argument, RAY_API_SERVER_ADDRESS, or the default.

    Raises: UsageError when it is not an http(s) URL, or has a user or password in it.
    """
    source = "--address"
    if address is None:
        address, source = os.environ.get("RAY_API_SERVER_ADDRESS"), "RAY_API_SERVER_ADDRESS"
    if not address:
        return DEFAULT_ADDRESS
    wanted = "wanted is the dashboard's address, such as http://HOST:8265"
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"{source}: {parts.scheme}://... is not http(s); {wanted}")
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"{source}: it has a user or password in it, which would end in logs; {wanted}, and "
            "the token through RAY_AUTH_TOKEN or --token-file"
        )
    try:
        port = parts.port
    except ValueError:
        raise UsageError(f"{source}: {parts.netloc!r} has no valid port; {wanted}") from None
    if not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"{source}: {address!r} is not an address; {wanted}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


def find_token(token_file: str | None) -> Token | None:
    """Return the cluster's token, or None where there is none.

    In this order: `token_file`, then as Ray does: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH,
    ~/.ray/auth_token.

    Raises: AuthError when a file that was asked for cannot be read or is empty.
    """
    if token_file is not None:
        return _token_of_file(Path(token_file).expanduser(), "--token-file")
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return _token_of_file(Path(path).expanduser(), "RAY_AUTH_TOKEN_PATH")
    default = Path("~/.ray/auth_token").expanduser()
    return _token_of_file(default, str(default)) if default.is_file() else None


def _token_of_file(path: Path, source: str) -> Token:
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AuthError(f"token missing: cannot read {path} ({source}): {error}") from error
    if not value or not value.isascii() or not value.isprintable():
        raise AuthError(f"token missing: {path} ({source}) holds no token; write it there, 0600")
    return Token(value, source)


def crosses_network_in_clear(address: str, token: Token | None) -> bool:
    """Say whether anybody on the way to `address` could read the token."""
    parts = urlsplit(address)
    return token is not None and parts.scheme == "http" and parts.hostname not in _LOOPBACK


class JobsRest:
    """The job API at `address` (see `find_address`).

    Raises, in every method: UnreachableError, AuthError, or ClusterError for any other answer
    than Ray's.
    """

    def __init__(
        self, address: str, token: Token | None, *, connect_timeout_s: float = CONNECT_TIMEOUT_S
    ) -> None:
        self.address = address
        self.token = token
        self._connect_timeout_s = connect_timeout_s

    def version(self) -> str:
        """Return the Ray version of the cluster."""
        return str(self._json("GET", "/api/version").get("ray_version", "unknown"))

    def python_version(self) -> str:
        """Return the Python version of the cluster's head."""
        answer = self._json("GET", "/api/v0/cluster_metadata")
        return str(_at(answer, "data", "pythonVersion") or "unknown")

    def jobs(self) -> dict[str, Json]:
        """Return the details of every submitted job, by submission id."""
        answer = self._call("GET", "/api/jobs/")
        if not isinstance(answer, list):
            raise self._unlike_ray("/api/jobs/")
        return {job["submission_id"]: job for job in answer if job.get("submission_id")}

    def job(self, submission_id: str) -> Json:
        """Return one job's details: `status`, `message`, `driver_exit_code`, ...

        Raises: NotFoundError.
        """
        return self._json("GET", f"/api/jobs/{quote(submission_id, safe='')}")

    def logs(self, submission_id: str) -> str:
        """Return all that the job's driver has printed so far.

        It tells nothing of the job's state: it is empty before the driver starts and may stop
        short of the end while the driver still runs.
        """
        answer = self._json("GET", f"/api/jobs/{quote(submission_id, safe='')}/logs")
        return str(answer.get("logs") or "")

    def stop(self, submission_id: str) -> bool:
        """Ask for the job's end (SIGTERM, later SIGKILL); return whether it was running."""
        answer = self._json("POST", f"/api/jobs/{quote(submission_id, safe='')}/stop")
        return bool(answer.get("stopped"))

    def node_resources(self) -> list[dict[str, float]]:
        """Return what each living node has in all, in Ray's units."""
        return [dict(node.get("resources_total") or {}) for node in self.nodes()]

    def head_python(self) -> str | None:
        """Return the interpreter that the head runs Ray's workers with, where it can be seen.

        `python` on a job's PATH need not be the one that has ray: a head that was started as
        /some/.venv/bin/ray leaves the PATH alone.
        """
        head = next((node for node in self.nodes() if node.get("is_head_node")), None)
        if head is None:
            return None
        detail = self._json("GET", f"/nodes/{quote(str(head.get('node_id')), safe='')}")
        prefix = "--python_worker_command="
        for argument in _at(detail, "data", "detail", "cmdline") or []:
            if str(argument).startswith(prefix):
                interpreter = str(argument)[len(prefix) :].split(" ", 1)[0]
                return interpreter if interpreter.startswith("/") else None
        return None

    def nodes(self) -> list[Json]:
        """Return what Ray's state API says of each living node."""
        answer = self._json("GET", "/api/v0/nodes?detail=1&limit=10000")
        nodes = _at(answer, "data", "result", "result")
        if not isinstance(nodes, list):
            raise self._unlike_ray("/api/v0/nodes")
        return [node for node in nodes if node.get("state") == "ALIVE"]

    def _json(self, method: str, path: str) -> Json:
        answer = self._call(method, path)
        if not isinstance(answer, dict):
            raise self._unlike_ray(path)
        return answer

    def _call(self, method: str, path: str) -> Any:
        status, body = self._exchange(method, path)
        if status == 401:
            raise AuthError(
                f"token missing: {self.address} wants one; set RAY_AUTH_TOKEN or pass --token-file"
            )
        if status == 403:
            source = f" (from {self.token.source})" if self.token else ""
            raise AuthError(
                f"token refused by {self.address}{source}; get the cluster's own token and set "
                "RAY_AUTH_TOKEN or pass --token-file"
            )
        text = body.decode("utf-8", "replace")
        if status == 404:
            raise NotFoundError(f"{self.address}: {_last_line(text) or 'not found'}")
        if status != 200:
            raise ClusterError(
                f"{self.address} answered {status} to {method} {path}: "
                f"{_last_line(text) or http.client.responses.get(status, 'no text')}"
            )
        try:
            return json.loads(text)
        except ValueError:
            raise self._unlike_ray(path) from None

    def _exchange(self, method: str, path: str) -> tuple[int, bytes]:
        parts = urlsplit(self.address)
        connection: http.client.HTTPConnection
        host = parts.hostname or ""
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                host,
                parts.port,
                timeout=self._connect_timeout_s,
                context=ssl.create_default_context(),
            )
        else:
            connection = http.client.HTTPConnection(
                host, parts.port, timeout=self._connect_timeout_s
            )
        headers = {"Accept": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token.value}"
        try:
            connection.connect()
            connection.sock.settimeout(_READ_TIMEOUT_S)
            connection.request(method, parts.path + path, headers=headers)
            response = connection.getresponse()
            body = response.read(_MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(
                f"cannot reach {self.address}: {_why(error)}; is the head up, and is this its "
                "dashboard's address (--address or RAY_API_SERVER_ADDRESS)?"
            ) from error
        finally:
            connection.close()
        if len(body) > _MAX_ANSWER_BYTES:
            raise ClusterError(
                f"{self.address} answered {path} with more than {_MAX_ANSWER_BYTES} bytes; read "
                "the files in the run folder instead"
            )
        return response.status, body

    def _unlike_ray(self, path: str) -> ClusterError:
        return ClusterError(
            f"{self.address}{path} does not answer like a Ray dashboard; check --address"
        )


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return f"unknown host ({error.strerror})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _last_line(text: str) -> str:
    # Ray answers with a whole traceback; its last line is the reason.
    lines = text.strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value
