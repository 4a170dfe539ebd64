"""What the tests of the recorder share on the ranks: a recorded default group, and its rings."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

# Public, but imported there without being exported in mypy's sense.
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from gangline.comm import recorder
from gangline.comm.events import CommEvent, Ring, list_rings, open_rings
from gangline.comm.mesh import Mesh

_num_groups = 0


class Ranks:
    """What a path needs: this rank, the others, and a tensor of 8 floats."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.other = (rank + 1) % world_size
        self.x = torch.full((8,), float(rank + 1))
        self.wide = torch.ones(8 * world_size)
        self.group: Any = dist.group.WORLD


@contextlib.contextmanager
def recorded(
    mesh: Mesh, folder: str, port: int, *, is_fallback: bool = False, **settings: Any
) -> Iterator[Ranks]:
    """Leave the mesh of the pool and form torch's default group with the recorder installed."""
    mesh.leave()
    recorder.install(folder, label=f"test-{mesh.rank}", is_fallback=is_fallback, **settings)
    form_default_group(mesh, port)
    try:
        yield Ranks(mesh.rank, mesh.world_size)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        recorder.uninstall()


def form_default_group(mesh: Mesh, port: int) -> None:
    global _num_groups
    _num_groups += 1
    store = PrefixStore(
        f"recorder-{mesh.generation}-{_num_groups}", TCPStore("127.0.0.1", port, is_master=False)
    )
    dist.init_process_group("gloo", store=store, rank=mesh.rank, world_size=mesh.world_size)


def rings_of(folder: str, rank: int) -> list[Ring]:
    return [ring for ring in open_rings(folder) if ring.info.rank == rank]


def num_own_rings(folder: str) -> int:
    return sum(path.name.startswith(f"{os.getpid()}-") for path in list_rings(folder))


def event_row(event: CommEvent) -> dict[str, Any]:
    return {
        "op": event.op.name,
        "num_bytes": event.num_bytes,
        "dtype": event.dtype,
        "peer": event.peer,
        "state": event.state.name,
        "match": event.match,
        "is_end_at_wait": event.is_end_at_wait,
        "duration_s": event.duration_s,
    }
