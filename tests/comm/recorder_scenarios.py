"""What ranks do in the tests of the recorder beside taking paths: fail, stop, die, join, leave."""

import contextlib
import ctypes
import multiprocessing.util
import os
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Public, but imported there without being exported in mypy's sense.
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d as c10d

from gangline.comm import collectives, recorder
from gangline.comm.errors import CommError
from gangline.comm.events import Op, list_rings
from gangline.comm.mesh import Mesh

sys.path.insert(0, str(Path(__file__).parent))  # ranks import this file by its path
from recorder_ranks import (  # type: ignore[import-not-found]
    Ranks,
    event_row,
    num_own_rings,
    recorded,
    rings_of,
)

# --- behaviour of torch, and of what is built on it ---------------------------------------------


def behaves_as_before(mesh: Mesh, folder: str, port: int, is_fallback: bool) -> dict[str, Any]:
    """Ask what programs ask of a group, with the recorder installed."""
    with recorded(mesh, folder, port, is_fallback=is_fallback) as ranks:
        group: Any = dist.group.WORLD
        backend = group._get_backend(torch.device("cpu"))
        c10d._set_pg_timeout(timedelta(seconds=7), group)
        answers = {
            "get_backend": dist.get_backend(),
            "class": type(backend).__name__,
            "same object": group._get_backend(torch.device("cpu")) is backend,
            "timeout_s": backend.options._timeout.total_seconds(),
            "ranks": dist.get_process_group_ranks(group),
            "name and desc": [group.group_name, group.group_desc],
            "sequence": group._get_sequence_number_for_group(),
            "has hooks": group._has_hooks(),
        }
        dist.all_reduce(ranks.x)
        answers["sequence later"] = group._get_sequence_number_for_group()
        with contextlib.suppress(RuntimeError):
            group._register_on_completion_hook(print)
            answers["hook"] = "taken"
        try:
            dist.all_reduce(torch.ones(2), op=dist.ReduceOp.BAND)
        except (RuntimeError, ValueError) as error:
            answers["refused"] = str(error).splitlines()[0]
        work = dist.isend(ranks.x, ranks.other)
        assert work is not None
        with contextlib.suppress(RuntimeError):
            work.get_future()
            answers["future"] = "given"
        dist.recv(torch.empty(8), ranks.other)
        work.wait()
        if mesh.rank == 0:
            try:
                dist.monitored_barrier(timeout=timedelta(seconds=0.5))
            except RuntimeError as error:
                answers["missing"] = str(error)
        else:
            time.sleep(1.0)
        (ring,) = rings_of(folder, mesh.rank)
        answers["states"] = Counter(event.state.name for event in ring.comm_events())
    return answers


def mesh_fails_as_before(mesh: Mesh, folder: str, port: int, is_fallback: bool) -> dict[str, Any]:
    """Lose a rank in the middle of a recorded all-reduce and receive; abort by sockets."""
    mesh.leave()
    recorder.install(folder, is_fallback=is_fallback)
    again = Mesh.join(
        rank=mesh.rank,
        world_size=mesh.world_size,
        store_host="127.0.0.1",
        store_port=port,
        generation=1000 + mesh.generation,
        timeout_s=30.0,
    )
    again_world = again.axes["world"]
    collectives.barrier(again, "world")
    started_s = time.monotonic()
    answers: dict[str, Any] = {"groups": []}
    if mesh.rank == 0:
        threading.Timer(0.2, again.abort).start()
    try:
        # Nobody sends: only the abort ends this.
        source = (mesh.rank + 1) % mesh.world_size
        collectives.recv(torch.empty(8), again, "world", source=source).wait()
    except CommError as error:
        answers["error"] = type(error).__name__
    answers["elapsed_s"] = time.monotonic() - started_s
    for ring in rings_of(folder, mesh.rank):
        answers["groups"].append([ring.info.group_desc, list(ring.info.ranks)])
        if ring.info.group_desc == "default_pg":
            answers["last"] = event_row(ring.comm_events()[-1])
    assert again_world.group is not None
    del again_world
    again.leave()
    answers["rings left"] = len(rings_of(folder, mesh.rank))
    recorder.uninstall()
    return answers


def records_every_dtype(mesh: Mesh, folder: str, port: int) -> list[list[str]]:
    """Enqueue a broadcast of each type; whether gloo can do it is not the question."""
    pairs = []
    with recorded(mesh, folder, port):
        (ring,) = rings_of(folder, 0)
        for name in dir(torch):
            dtype = getattr(torch, name)
            # Complex numbers travel as real ones.
            is_own = isinstance(dtype, torch.dtype) and str(dtype) == f"torch.{name}"
            if is_own and not dtype.is_complex:
                before = ring.last_enqueued
                with contextlib.suppress(Exception):
                    dist.broadcast(torch.empty(4, dtype=dtype), 0)
                pairs += [[name, event.dtype] for event in ring.comm_events(since=before)]
    return pairs


# --- what can be read of a rank that is stopped, holds the GIL, or is dead ----------------------


def pids_of(ranks: Ranks) -> list[int]:
    pids: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(pids, os.getpid())
    return pids


def read_while_stopped(mesh: Mesh, folder: str, port: int, is_fallback: bool) -> dict[str, Any]:
    """Rank 0 stops rank 1 in a receive, and reads what it was at."""
    with recorded(mesh, folder, port, is_fallback=is_fallback) as ranks:
        pids = pids_of(ranks)
        if mesh.rank == 1:
            dist.recv(ranks.x, 0)
            return {}
        (ring,) = rings_of(folder, 1)
        wait_until(lambda: Op.RECV in ring.open_events()["op"])
        os.kill(pids[1], signal.SIGSTOP)
        wait_until(lambda: process_state(pids[1]) == "T")
        started_s = time.monotonic()
        found = {
            "open": [event_row(ring.to_comm_event(row)) for row in ring.open_events()],
            "events": len(ring.events()),
            "is_alive": ring.writer_is_alive(),
            "read_s": time.monotonic() - started_s,
            "state": process_state(pids[1]),
        }
        os.kill(pids[1], signal.SIGCONT)
        dist.send(ranks.x, 1)
        found["open later"] = wait_until(lambda: len(ring.open_events()) == 0)
    return found


def read_while_gil_is_held(mesh: Mesh, folder: str, port: int, is_fallback: bool) -> dict[str, Any]:
    """Rank 1 holds its GIL while an all-reduce that it has begun completes; rank 0 looks on."""
    with recorded(mesh, folder, port, is_fallback=is_fallback) as ranks:
        dist.barrier()
        if mesh.rank == 1:
            work = dist.all_reduce(ranks.x, async_op=True)
            started_ns = time.monotonic_ns()
            ctypes.PyDLL(None).sleep(2)
            held = [started_ns, time.monotonic_ns()]
            work.wait()
            dist.barrier()
            (ring,) = rings_of(folder, 1)
            end_ns = next(e.end_ns for e in ring.comm_events() if e.op == Op.ALL_REDUCE)
            dist.barrier()
            return {"held": held, "end_ns": end_ns}
        (ring,) = rings_of(folder, 1)
        wait_until(lambda: len(ring.open_events()) == 1)
        time.sleep(0.3)
        work = dist.all_reduce(ranks.x, async_op=True)
        work.wait()
        states = []
        end_s = time.monotonic() + 0.3
        while time.monotonic() < end_s:
            states = [event.state.name for event in ring.comm_events()]
            time.sleep(0.01)
        seen_ns = time.monotonic_ns()
        dist.barrier()
        dist.barrier()
    return {"states": states, "seen_ns": seen_ns}


def read_after_a_kill(
    mesh: Mesh, folder: str, port: int, is_fallback: bool, dies: list[int]
) -> dict[str, Any]:
    """Rank 1 is killed in a receive; rank 0 reads its ring afterwards, or dies, too."""
    with recorded(mesh, folder, port, is_fallback=is_fallback) as ranks:
        pids = pids_of(ranks)
        if mesh.rank == 1:
            threading.Timer(0.3, os.kill, (pids[1], signal.SIGKILL)).start()
            dist.recv(ranks.x, 0)
        (ring,) = rings_of(folder, 1)
        wait_until(lambda: process_state(pids[1]) in ("Z", ""))
        error = ""
        try:
            dist.recv(ranks.x, 1)
        except RuntimeError as problem:
            error = str(problem).splitlines()[0]
        if 0 in dies:
            os.kill(os.getpid(), signal.SIGKILL)
        again = next(iter(rings_of(folder, 1)))  # not only for who had it open
        (mine,) = rings_of(folder, 0)
        found = {
            "error": error,
            "open": [event_row(again.to_comm_event(row)) for row in again.open_events()],
            "events": len(ring.events()),
            "is_alive": again.writer_is_alive(),
            "mine": event_row(mine.comm_events()[-1]),
        }
    found["rings left"] = len(list(list_rings(folder)))
    return found


def process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def wait_until(ask: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    end_s = time.monotonic() + timeout_s
    while not (answer := ask()):
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.005)
    return answer


# --- the life of rings --------------------------------------------------------------------------


def join_and_leave(
    mesh: Mesh, folder: str, port: int, is_fallback: bool, num_cycles: int
) -> dict[str, Any]:
    """Form and leave a mesh again and again; count what is held before and after."""
    mesh.leave()
    recorder.install(folder, is_fallback=is_fallback)
    counts: list[dict[str, int]] = []
    for cycle in range(num_cycles):
        again = Mesh.join(
            rank=mesh.rank,
            world_size=mesh.world_size,
            store_host="127.0.0.1",
            store_port=port,
            generation=10_000 + 100 * mesh.generation + cycle,
            timeout_s=30.0,
        )
        collectives.barrier(again, "world")
        collectives.barrier(again, "checkpoint")
        num_rings = num_own_rings(folder)
        collectives.barrier(again, "world")
        again.leave()
        maps = Path("/proc/self/maps").read_text()
        counts.append(
            {
                "rings in use": num_rings,
                "rings": num_own_rings(folder),
                "mapped": maps.count(".ring"),
                "fds": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
                "KiB": int(
                    re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]
                ),
            }
        )
    recorder.uninstall()
    return {"counts": counts, "fds at the end": len(os.listdir("/proc/self/fd"))}


def anonymous_kib() -> int:
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def train_without_a_folder(mesh: Mesh, folder: str, port: int, max_file_bytes: int) -> list[str]:
    """Communicate though no ring can be made; return the warnings."""
    warnings_: list[str] = []
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    with recorded(mesh, folder, port, report=warnings_.append) as ranks:
        dist.all_reduce(ranks.x)
        group = dist.new_group([0, 1])
        dist.all_reduce(ranks.x, group=group)
        assert ranks.x[0] == 6
    assert not list(Path(folder).glob(f"*{os.getpid()}*"))
    return warnings_


def install_twice_and_change(mesh: Mesh, folder: str, port: int) -> dict[str, int]:
    """Install again for the same and for another folder; record a fork's groups as its own."""
    with recorded(mesh, folder, port) as ranks:
        recorder.install(folder)
        dist.new_group([0, 1])
        dist.barrier()
        before = num_own_rings(folder)
        recorder.install(folder + "-2")
        dist.all_reduce(ranks.x)
        group = dist.new_group([0, 1])
        dist.all_reduce(ranks.x, group=group)
        assert ranks.x[0] == 6
        found = {
            "before": before,
            "after": num_own_rings(folder),
            "other": num_own_rings(folder + "-2"),
        }
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(SystemExit):
                sys.exit(0)
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]
            os._exit(0)
        os.waitpid(pid, 0)
        found["after a fork's end"] = num_own_rings(folder + "-2")
        recorder.uninstall()
        dist.barrier()
        found["after uninstall"] = os.path.exists(folder + "-2")
        dist.barrier()
        dist.all_reduce(ranks.x, group=group)
        dist.new_group([0, 1])
        found["not recorded"] = num_own_rings(folder + "-2")
    return found


def two_backends(mesh: Mesh, folder: str, port: int) -> list[Any]:
    """Form a group with one backend per type of device; torch's fake one stands for NCCL."""
    import torch.testing._internal.distributed.fake_pg  # registers it

    mesh.leave()
    recorder.install(folder)
    store = PrefixStore(
        f"two-backends-{mesh.generation}", TCPStore("127.0.0.1", port, is_master=False)
    )
    dist.init_process_group(
        "cpu:gloo,cuda:fake", store=store, rank=mesh.rank, world_size=mesh.world_size
    )
    x = torch.ones(8)
    dist.all_reduce(x)
    assert x[0] == mesh.world_size
    group: Any = dist.group.WORLD
    classes = [type(group._get_backend(torch.device(name))).__name__ for name in ("cpu", "cuda")]
    found = [
        [ring.info.backend, list(ring.info.devices), ring.last_enqueued]
        for ring in rings_of(folder, mesh.rank)
    ]
    dist.barrier()
    dist.destroy_process_group()
    recorder.uninstall()
    return [classes, sorted(found)]


def deepspeed_step(mesh: Mesh, folder: str, port: int, stage: int) -> list[Any]:
    """Take a step of DeepSpeed's engine on the CPU."""
    import deepspeed

    os.environ |= {"LOCAL_RANK": "0", "RANK": str(mesh.rank), "WORLD_SIZE": str(mesh.world_size)}
    # Only a faster way for inference on one machine, and minutes to build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with recorded(mesh, folder, port):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "Adam", "params": {"torch_adam": True, "lr": 1e-3}},
        }
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=config,
            dist_init_required=False,
        )
        before = {ring.path: ring.last_enqueued for ring in rings_of(folder, mesh.rank)}
        engine.backward(engine(torch.ones(1, 8)).sum())
        engine.step()
        return [
            event_row(event)
            for ring in rings_of(folder, mesh.rank)
            for event in ring.comm_events(since=before.get(ring.path, 0))
        ]
