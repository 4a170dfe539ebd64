"""A Ray dashboard of a few canned answers, which demands its token."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gangline.orchestrator.jobs_rest import Token

SECRET = "s3cret-of-the-cluster"
TOKEN = Token(SECRET, "a test")


class FakeHead:
    """A dashboard of a few canned answers, which demands the token."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.seen: list[tuple[str, str]] = []
        head = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                head.seen.append((self.command, self.path))
                sent = self.headers.get("Authorization")
                if sent is None:
                    status, body = 401, b"Unauthorized: Missing authentication token"
                elif sent != f"Bearer {SECRET}":
                    status, body = 403, b"Forbidden: Invalid authentication token"
                else:
                    status, body = head.answers.get(self.path, (404, b"Job x does not exist"))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = answer
            do_POST = answer

            def log_message(self, *words: object) -> None:
                """Stay silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._serve, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def _serve(self) -> None:
        self._server.serve_forever(poll_interval=0.01)

    def says(self, path: str, value: object) -> None:
        self.answers[path] = (200, json.dumps(value).encode())

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
