"""Name the ranks of a run: axes -> ranks and process groups, formed and left per generation.

rank = dp_index * expert_parallel + ep_index

axis         ranks on it                              used for
"world"      all                                      gradients of replicated parameters, votes
"ep"         same dp_index                            token exchange between expert shards
"dp"         same ep_index: the same expert shard     gradients of experts
"checkpoint" all, in a gloo group of its own          the checkpoint thread, beside the training

A *host* is a set of ranks between which the links are fast; every rank says at the join on which
it is.

`Mesh.single()` is the one-rank case of the same code: every axis has size 1 and no group, and the
collectives skip communication.

`Mesh.abort`, and `AbortSwitch.abort` already while the mesh forms, end any wait of this rank on its
peers. They cannot end a connect to a store whose host does not answer at all (`timeout_s` does),
nor a wait of a checkpoint thread on the disk.
"""

import json
import socket
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Public, but imported there without being exported in mypy's sense.
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from gangline.comm import sockets
from gangline.comm.abort import AbortSwitch
from gangline.comm.errors import JoinError
from gangline.comm.traffic import Link, Traffic

AXES = ("world", "dp", "ep", "checkpoint")
_CHECKPOINT_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Axis:
    """The ranks that this rank meets along one axis."""

    name: str
    ranks: tuple[int, ...]  # global ranks, in order
    index: int  # this rank's place among them
    group: dist.ProcessGroup | None  # None where the axis has one rank
    hosts: tuple[int, ...]  # the host of each of `ranks`; hosts are numbered as ranks meet them

    @property
    def size(self) -> int:
        return len(self.ranks)

    def link_to(self, place: int) -> Link:
        """Return the class of the link from this rank to a place on the axis."""
        if place == self.index:
            return Link.LOCAL
        same = self.hosts[place] == self.hosts[self.index]
        return Link.INTRA_HOST if same else Link.INTER_HOST


class Mesh:
    """Hold the axes of one generation from `join` to `leave`."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        generation: int,
        device: torch.device,
        axes: dict[str, Axis],
        timeout_s: float,
        switch: AbortSwitch,
        peer_addresses: dict[sockets.Address, int] | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.generation = generation
        self.device = device
        self.axes = axes
        self.timeout_s = timeout_s
        self.traffic = Traffic()
        self._switch = switch
        self._peer_addresses = peer_addresses or {}
        self._num_ops: Counter[str] = Counter()
        self._is_left = False

    @classmethod
    def single(cls, device: str = "cpu", *, generation: int = 0) -> "Mesh":
        """Return the mesh of one rank; nothing is communicated."""
        return cls(
            rank=0,
            world_size=1,
            generation=generation,
            device=torch.device(device),
            axes={name: Axis(name, (0,), 0, None, (0,)) for name in AXES},
            timeout_s=0.0,
            switch=AbortSwitch(),
        )

    @classmethod
    def join(
        cls,
        *,
        rank: int,
        world_size: int,
        store_host: str,
        store_port: int,
        generation: int,
        expert_parallel: int = 1,
        device: str = "cpu",
        timeout_s: float = 60.0,
        switch: AbortSwitch | None = None,
        host: str | None = None,
    ) -> "Mesh":
        """Form the groups of a generation together with the other ranks.

        With a `switch` of the caller's, another thread can end the join, too. `host` names the
        host of this rank, the same string on all its ranks; None takes the address from which this
        rank reaches the store.

        Communicates: a rendezvous over the store, then one connection per pair of ranks and group.
        Raises: ValueError for a layout that does not divide; JoinError when the other ranks do not
        come within `timeout_s`. After a JoinError nothing is left behind: join again at will.
        Guarantees: ranks of different generations never meet.
        """
        if world_size % expert_parallel:
            raise ValueError(
                f"mesh.expert_parallel {expert_parallel} does not divide {world_size} workers; "
                "set it to a divisor of the number of workers"
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank is {rank}; with {world_size} workers give 0 to {world_size - 1}"
            )
        if world_size == 1:
            return cls.single(device, generation=generation)
        started = time.monotonic()
        switch = switch or AbortSwitch()
        before = sockets.open_sockets()
        try:
            address = (socket.gethostbyname(store_host), store_port)
            with switch.while_joining(address, opened_since=before):
                store = _connect(store_host, store_port, generation, timeout_s)
                mine = host or sockets.address_towards(address)
                labels = _exchange(store, "host", mine, rank, world_size)
                hosts = tuple(list(dict.fromkeys(labels)).index(label) for label in labels)
                axes = _form_groups(store, rank, hosts, expert_parallel, device, timeout_s)
                connections, peers = _find_connections(store, rank, world_size, before)
                switch.breaks(
                    connections,
                    [axis.group for axis in axes.values()],
                    torch.device(device),
                )
        except Exception as error:
            # torch raises RuntimeError, ValueError, DistNetworkError and DistStoreError here.
            _destroy_groups()
            waited_for = f"store {store_host}:{store_port}, {world_size} ranks expected"
            raise JoinError(
                op=f"join of generation {generation}",
                axis="world",
                rank=rank,
                elapsed_s=time.monotonic() - started,
                detail="aborted by this process" if switch.is_pulled else f"{error}; {waited_for}",
            ) from error
        return cls(
            rank=rank,
            world_size=world_size,
            generation=generation,
            device=torch.device(device),
            axes=axes,
            timeout_s=timeout_s,
            switch=switch,
            peer_addresses=peers,
        )

    def axis_size(self, name: str) -> int:
        """Return how many ranks are on this axis."""
        return self.axes[name].size

    def axis_rank(self, name: str) -> int:
        """Return this rank's place on this axis."""
        return self.axes[name].index

    def group(self, name: str) -> dist.ProcessGroup | None:
        """Return the process group of this axis; None where it has one rank."""
        return self.axes[name].group

    def next_sequence(self, axis: str) -> int:
        """Count one more operation on this axis and return its number, from 1."""
        self._num_ops[axis] += 1
        return self._num_ops[axis]

    def rank_at(self, address: sockets.Address) -> int | None:
        """Return the rank whose end of a connection this is; None for a stranger."""
        return self._peer_addresses.get(address)

    @property
    def is_aborted(self) -> bool:
        return self._switch.is_pulled

    def abort(self) -> None:
        """Break every wait of this rank on its peers, and so theirs on it.

        May be called from any thread, at any time, more than once. The waiting call raises
        CommError within milliseconds, also when the peer is stopped (SIGSTOP) and silent.
        """
        self._switch.abort()

    def leave(self) -> None:
        """Give up the groups. Idempotent; never waits for a peer.

        Call it from the thread that joined, after every collective of this rank has returned or
        raised. Peers that still wait for this rank get a PeerLostError.
        """
        if self._is_left:
            return
        self._is_left = True
        if self.world_size > 1:
            # Sockets first: a gloo group joins its worker threads when it is destroyed, and one
            # that waits for a silent peer would hold us until its time-out.
            self.abort()
            self._switch.forget()
            self.axes = {name: replace(axis, group=None) for name, axis in self.axes.items()}
            _destroy_groups()


def open_store(world_size: int, *, host: str = "127.0.0.1") -> tuple[TCPStore, int]:
    """Open the store at which a generation's ranks meet; return it and its port.

    It listens on `host` alone and lives as long as the returned object.
    """
    listener = socket.create_server((host, 0), backlog=4096)
    store = TCPStore(
        host,
        listener.getsockname()[1],
        world_size,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, store.port


def _connect(host: str, port: int, generation: int, timeout_s: float) -> Store:
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    return PrefixStore(f"generation-{generation}", store)


def _form_groups(
    store: Store, rank: int, hosts: tuple[int, ...], degree: int, device: str, timeout_s: float
) -> dict[str, Axis]:
    world_size = len(hosts)
    timeout = timedelta(seconds=timeout_s)
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda and torch.device(device).index is not None:
        torch.cuda.set_device(device)
    everyone = tuple(range(world_size))
    ep_ranks = [tuple(range(first, first + degree)) for first in range(0, world_size, degree)]
    dp_ranks = [tuple(range(shard, world_size, degree)) for shard in range(degree)]
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    axes = {"world": Axis("world", everyone, rank, dist.group.WORLD, hosts)}
    # Every rank makes every group, in this order. An axis that spans the world, as "dp" does
    # without expert parallelism, is the world group; one of a single rank needs none.
    for name, partition in (("dp", dp_ranks), ("ep", ep_ranks)):
        for ranks in partition:
            group = dist.group.WORLD if ranks == everyone else None
            if 1 < len(ranks) < world_size:
                group = dist.new_group(
                    list(ranks), timeout=timeout, backend=backend, group_desc=name
                )
            if rank in ranks:
                of_ranks = tuple(hosts[other] for other in ranks)
                axes[name] = Axis(name, ranks, ranks.index(rank), group, of_ranks)
    # Its waits are for disks, of which one may be much slower than the others; a peer that is gone
    # is noticed by its broken connection, not by this time-out.
    own = dist.new_group(
        list(everyone), timeout=_CHECKPOINT_TIMEOUT, backend="gloo", group_desc="checkpoint"
    )
    axes["checkpoint"] = Axis("checkpoint", everyone, rank, own, hosts)
    return axes


def _find_connections(
    store: Store, rank: int, world_size: int, before: set[int]
) -> tuple[set[int], dict[sockets.Address, int]]:
    """Return the inodes of the groups' connections, and whose end each far address is."""
    # Ranks tell each other where their groups listen, because only a group's own addresses tell
    # its connections from those that other libraries of this process opened meanwhile.
    listens = _exchange(
        store, "listens", sockets.listening_addresses(opened_since=before), rank, world_size
    )
    addresses = [tuple(address) for ends in listens for address in ends]
    found = sockets.connections_between(addresses, opened_since=before)
    # And from where they connect, because that is all that an error says of a peer.
    connects = _exchange(store, "connects", sockets.own_addresses(found), rank, world_size)
    peers = {
        tuple(address): other
        for table in (listens, connects)
        for other, ends in enumerate(table)
        for address in ends
        if other != rank
    }
    return found, peers


def _exchange(store: Store, key: str, value: Any, rank: int, world_size: int) -> list[Any]:
    """Return the JSON values of all ranks, by rank; over the store, before there is a group."""
    keys = [f"{key}-{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps(value))
    store.wait(keys)
    return [json.loads(text) for text in store.multi_get(keys)]


def _destroy_groups() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    else:
        # torch names groups by a count of this process, which a failed init leaves raised (torch
        # 2.13); at the next join this rank would then wait under another name than its peers.
        dist.distributed_c10d._world.group_count = 0
