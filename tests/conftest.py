"""What several rooms' tests share: a pool of processes that act as the ranks of a mesh."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

_SERVER = Path(__file__).with_name("rank_server.py")


class RankProcess:
    """One process that runs scenarios as a rank."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None, "made with a pipe"
        return self.process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None, "made with a pipe"
        return self.process.stdout

    def end(self) -> None:
        """Kill the process, stopped or not, and wait for it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


class RankPool:
    """Run a scenario on several ranks at once; a process that died is replaced."""

    def __init__(self) -> None:
        self._ranks: list[RankProcess] = []
        self._stores: dict[int, tuple[object, int]] = {}
        self._generation = 0

    def run(
        self,
        world_size: int,
        scenario: tuple[Path, str],
        *,
        expert_parallel: int = 1,
        mesh: bool = True,
        may_die: tuple[int, ...] = (),
        timeout_s: float = 60.0,
        **kwargs: Any,
    ) -> list[Any]:
        """Return what the scenario returned on each rank; None for one in `may_die` that died.

        The scenario is a function of (mesh, **kwargs), or of (**kwargs) with `mesh` False, in a
        file that the ranks import; values travel as JSON. An error on any rank fails the test.
        """
        self._start(world_size)
        self._generation += 1
        file, function = scenario
        for rank in range(world_size):
            place = None
            if mesh:
                place = {
                    "rank": rank,
                    "world_size": world_size,
                    "store_host": "127.0.0.1",
                    "store_port": self.store_port(world_size),
                    "generation": self._generation,
                    "expert_parallel": expert_parallel,
                    "timeout_s": 30.0,
                }
            job = {"file": str(file), "function": function, "kwargs": kwargs, "mesh": place}
            self._ranks[rank].stdin.write(json.dumps(job).encode() + b"\n")
            self._ranks[rank].stdin.flush()
        replies = self._collect(world_size, timeout_s)
        for rank, reply in enumerate(replies):
            if reply is None and rank not in may_die:
                pytest.fail(f"rank {rank} of {world_size} died")
            if reply is not None and "error" in reply:
                pytest.fail(f"rank {rank} of {world_size}:\n{reply['error']}")
        return [reply and reply["result"] for reply in replies]

    def send_signal(self, rank: int, number: int) -> None:
        """Send a signal to the process of a rank."""
        os.killpg(self._ranks[rank].process.pid, number)

    def store_port(self, world_size: int) -> int:
        """Return the port of a store at which so many ranks can meet."""
        from gangline.comm.mesh import open_store

        if world_size not in self._stores:
            self._stores[world_size] = open_store(world_size)
        return self._stores[world_size][1]

    def close(self) -> None:
        """End all processes."""
        for rank in self._ranks:
            rank.end()

    def _start(self, num_ranks: int) -> None:
        for place, rank in enumerate(self._ranks):
            if rank.process.poll() is not None:
                rank.end()
                self._ranks[place] = RankProcess()
        while len(self._ranks) < num_ranks:
            self._ranks.append(RankProcess())

    def _collect(self, num_ranks: int, timeout_s: float) -> list[Any]:
        replies: list[Any] = [None] * num_ranks
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for rank in range(num_ranks):
                selector.register(self._ranks[rank].stdout, selectors.EVENT_READ, rank)
            while selector.get_map():
                ready = selector.select(deadline - time.monotonic())
                if not ready:
                    silent = [key.data for key in selector.get_map().values()]
                    for rank in silent:
                        self._ranks[rank].end()
                    pytest.fail(f"ranks {silent} of {num_ranks} said nothing in {timeout_s} s")
                for key, _ in ready:
                    line = self._ranks[key.data].stdout.readline()
                    replies[key.data] = json.loads(line) if line else None
                    selector.unregister(key.fileobj)
                    if not line:
                        self._ranks[key.data].process.wait()
        return replies


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Give a pool of rank processes that lives as long as the test session."""
    pool = RankPool()
    yield pool
    pool.close()
