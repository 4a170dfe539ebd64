"""Does a tracking server that is down or hung cost the job anything, and does it lose a point?

    python benchmarks/tracking_outage.py --seconds 60 --fault killed --fault hung

Appends one step of metrics at a time, as a controller does, before, during and after an outage of
a real MLflow server on the loopback device, and then compares the server's database with what was
appended: every point once in the run of the job and once in the run of the attempt. Each append is
paired with one to a control spool that nobody uploads, so that what else the machine does at that
moment is in both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import psutil

from gangline.monitoring.tracker import Tracker, UploaderProcess, spawn_uploader

NUM_KEYS = 12
KEYS = [
    "train/loss",
    "train/num_tokens",
    "train/tokens_per_s",
    "train/grad_norm",
    "train/lr",
    "train/step_s",
    "train/data_s",
    "train/forward_backward_s",
    "train/reduce_s",
    "train/optimizer_s",
    "moe/expert_entropy",
    "moe/z_loss",
]


class MlflowServer:
    """A real `mlflow server` on a loopback port of its own, with a SQLite store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "mlflow.db"
        self.log_path = folder / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 120.0) -> None:
        """Start the server and wait until it answers."""
        env = dict(os.environ)
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        env.update(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true")
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"mlflow server did not start; see {self.log_path}")
            time.sleep(0.1)

    def is_ready(self) -> bool:
        """Return whether the server answers."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """End the server and its workers with SIGKILL."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def num_requests(self, endpoint: str) -> int:
        """Return how many requests to an endpoint the server has answered with 200."""
        return len(re.findall(rf'{endpoint}[^"]*" 200', self.log_path.read_text()))


class FaultProxy:
    """A TCP proxy that misbehaves on demand, in a thread of its own.

    Modes: `pass`; `hang` (accept, read, never answer); `drop` (let the server execute the request,
    then cut the connection instead of answering); `late` (hand the request on after `delay_s`, when
    the client has given up); `error` (answer 500). `only` limits it to requests with that text.
    """

    def __init__(self, upstream_port: int) -> None:
        self.mode = "pass"
        self.only = b""
        self.delay_s = 3.0
        self.num_faults: Counter[str] = Counter()
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        opening = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(opening, self._loop).result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop listening and end the thread."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _close(self) -> None:
        self._server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        try:
            server, request = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            answer.transport.abort()
            return
        meant = asyncio.Event()  # set while the request on this connection has the text of `only`
        back = asyncio.create_task(self._answer(server, answer, request, meant))
        with contextlib.suppress(OSError):
            await self._request(client, answer, request, meant)
        # A late request is executed although nobody waits for the answer any more.
        await asyncio.wait([back], timeout=10 if self.num_faults["late"] else 0)
        back.cancel()
        request.transport.abort()
        answer.transport.abort()

    async def _request(
        self,
        client: asyncio.StreamReader,
        answer: asyncio.StreamWriter,
        request: asyncio.StreamWriter,
        meant: asyncio.Event,
    ) -> None:
        while data := await client.read(2**16):
            if re.match(rb"[A-Z]+ /", data):  # else the body that belongs to the last head
                (meant.set if self.only in data else meant.clear)()
            mode = self.mode if meant.is_set() else "pass"
            if mode in ("hang", "late", "error"):
                self.num_faults[mode] += 1
            if mode == "hang":
                while self.mode == "hang" and not client.at_eof():
                    await asyncio.sleep(0.05)
                return
            if mode == "error":
                answer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops")
                await answer.drain()
                return
            if mode == "late":
                await asyncio.sleep(self.delay_s)
            request.write(data)
            await request.drain()

    async def _answer(
        self,
        server: asyncio.StreamReader,
        answer: asyncio.StreamWriter,
        request: asyncio.StreamWriter,
        meant: asyncio.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await server.read(2**16):
                if self.mode == "drop" and meant.is_set():
                    self.num_faults["drop"] += 1
                    break
                answer.write(data)
                await answer.drain()
        answer.transport.abort()
        request.transport.abort()


def stored_points(database: Path) -> dict[str, Counter[tuple[str, int, float]]]:
    """Return (key, step, value) of every point in an MLflow database, by generation."""
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection:
        tags = connection.execute(
            "select run_uuid, value from tags where key = 'gangline.generation'"
        ).fetchall()
        rows = connection.execute("select run_uuid, key, step, value, is_nan from metrics")
        points: dict[str, Counter[tuple[str, int, float]]] = {value: Counter() for _, value in tags}
        generation = dict(tags)
        for run, key, step, value, is_nan in rows:
            points[generation[run]][key, step, float("nan") if is_nan else value] += 1
    return points


def percentiles(latencies_s: list[float]) -> dict[str, float]:
    """Return n, and p50, p99 and maximum in microseconds."""
    ordered = sorted(latencies_s)
    n = len(ordered)
    return {
        "n": n,
        "p50_us": round(ordered[n // 2] * 1e6, 1),
        "p99_us": round(ordered[min(int(n * 0.99), n - 1)] * 1e6, 1),
        "max_us": round(ordered[-1] * 1e6, 1),
    }


def run_outage_bench(
    seconds: float, fault: str, *, baseline_s: float = 10.0, period_s: float = 0.02
) -> dict[str, object]:
    """Measure appends before, during and after an outage, then check the server's database.

    `fault` is `killed` (SIGKILL, restarted afterwards) or `hung` (accepts, never answers).
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
        server = MlflowServer(Path(folder))
        cleanup.callback(server.kill)
        server.start()
        proxy = FaultProxy(server.port)
        cleanup.callback(proxy.close)
        spool = Path(folder) / "spool"
        tracker = Tracker(spool)
        cleanup.callback(tracker.close)
        uploader = spawn_uploader(spool, proxy.uri, request_timeout_s=5)
        cleanup.callback(uploader.stop)
        tracker.start_run("bench-outage", "bench", None, {"fault": fault}, {})
        tracker.start_attempt(1)
        control = Tracker(Path(folder) / "control")
        cleanup.callback(control.close)
        control.start_run("bench-control", "bench", None, {}, {})
        phases = Phases(tracker, control, period_s)
        phases.run("warm-up", 2.0)
        assert uploader.wait_drained(60), "the server takes points before the outage"
        phases.run("before", baseline_s)
        pending_before = uploader.pending()
        if fault == "killed":
            server.kill()
        else:
            proxy.mode = "hang"
        phases.run("during", seconds)
        pending_during = uploader.pending()
        refused = not server.is_ready() or proxy.num_faults["hang"] > 0
        if fault == "killed":
            server.start()
        proxy.mode = "pass"
        catch_up = CatchUp(uploader, max_pending=round(2 / period_s))
        phases.run("after", baseline_s)
        drained = uploader.wait_drained(120)
        catch_up_s = catch_up.seconds()
        rss_bytes = psutil.Process(uploader.pid).memory_info().rss
        uploader.stop()
        server.kill()
        stored = stored_points(server.database)
    expected = {(key, step) for step in range(phases.step) for key in KEYS}
    result: dict[str, object] = {"fault": fault, "outage_s": seconds, "fault_happened": refused}
    result["append"] = {
        name: {"job": percentiles(job), "control": percentiles(control)}
        for name, (job, control) in phases.latencies_s.items()
    }
    result["records_waiting"] = {"before": pending_before, "at_the_end_of_it": pending_during}
    result["drained"] = drained
    result["caught_up_s_after_it"] = catch_up_s
    for run, points in stored.items():
        times = Counter((key, step) for (key, step, _), n in points.items() for _ in range(n))
        result[f"run_{run or 'job'}"] = {
            "points": len(expected),
            "missing": len(expected - times.keys()),
            "doubled": sum(n - 1 for n in times.values()),
        }
    result["uploader_rss_mib"] = round(rss_bytes / 2**20, 1)
    return result


class CatchUp:
    """Time from now until no more than two seconds of appends wait, while appends go on."""

    def __init__(self, uploader: UploaderProcess, max_pending: int) -> None:
        self._seconds: float | None = None
        self._thread = threading.Thread(target=self._watch, args=(uploader, max_pending))
        self._thread.start()

    def seconds(self) -> float | None:
        """Return the time, or None if it had not come within two minutes."""
        self._thread.join()
        return self._seconds

    def _watch(self, uploader: UploaderProcess, max_pending: int) -> None:
        began = time.monotonic()
        while time.monotonic() < began + 120:
            if uploader.pending() <= max_pending:
                self._seconds = round(time.monotonic() - began, 1)
                return
            time.sleep(0.1)


class Phases:
    """Append one step of metrics every `period_s` and keep the time that each append took."""

    def __init__(self, job: Tracker, control: Tracker, period_s: float) -> None:
        self.latencies_s: dict[str, tuple[list[float], list[float]]] = {}
        self.step = 0
        self._trackers = (job, control)
        self._period_s = period_s

    def run(self, name: str, seconds: float) -> None:
        """Append for `seconds` and file the latencies of job and control under `name`."""
        latencies: tuple[list[float], list[float]] = ([], [])
        self.latencies_s[name] = latencies
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            values = {key: self.step + index / NUM_KEYS for index, key in enumerate(KEYS)}
            # Which of the two goes first changes, since the first may pay for cold caches.
            for which in (0, 1) if self.step % 2 else (1, 0):
                start = time.perf_counter()
                durable = self._trackers[which].log_metrics(self.step, values, generation=1)
                latencies[which].append(time.perf_counter() - start)
                assert durable, "the spool has room and the disk is well"
            self.step += 1
            time.sleep(self._period_s)


def main() -> None:
    """Run the chosen faults and print one JSON object for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the outage")
    parser.add_argument("--fault", action="append", choices=["killed", "hung"])
    options = parser.parse_args()
    print(json.dumps({"machine": platform.platform(), "cores": os.cpu_count()}))
    for fault in options.fault or ["killed", "hung"]:
        print(json.dumps(run_outage_bench(options.seconds, fault), indent=2), flush=True)


if __name__ == "__main__":
    main()
