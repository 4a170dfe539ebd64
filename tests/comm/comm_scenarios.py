"""What each rank does in the tests of comm/; run by rank_server.py."""

import os
import signal
import socket
import threading
import time
from typing import Any

import torch

from gangline.comm import collectives, row_exchange
from gangline.comm.abort import AbortSwitch
from gangline.comm.errors import CommError, JoinError
from gangline.comm.mesh import Mesh
from gangline.comm.traffic import Link


def describe(mesh: Mesh) -> dict[str, Any]:
    """Return the axes, and what a gather over each one finds there."""
    mine = torch.tensor([mesh.rank])
    return {
        name: {
            "ranks": list(axis.ranks),
            "index": axis.index,
            "met": collectives.all_gather(mine, mesh, name).flatten().tolist(),
        }
        for name, axis in mesh.axes.items()
    }


def use_all_collectives(mesh: Mesh) -> None:
    """Compare every collective with its formula, on every axis."""
    for name, axis in mesh.axes.items():
        ranks = torch.tensor(axis.ranks, dtype=torch.float64)
        for op, truth in (("sum", ranks.sum()), ("min", ranks.min()), ("max", ranks.max())):
            x = torch.full((3, 5), float(mesh.rank), dtype=torch.float64)
            collectives.all_reduce(x, mesh, name, op=op).wait()  # type: ignore[arg-type]
            assert torch.equal(x, torch.full_like(x, float(truth))), (name, op, x)
        for root in range(axis.size):
            x = torch.tensor([mesh.rank])
            collectives.broadcast(x, mesh, name, root=root).wait()
            assert x.item() == axis.ranks[root]
        values = collectives.exchange_json({"rank": mesh.rank, "é": [None] * mesh.rank}, mesh, name)
        assert values == [{"rank": rank, "é": [None] * rank} for rank in axis.ranks]
        counts = torch.arange(2 * axis.size).view(axis.size, 2) + 100 * mesh.rank
        received = collectives.exchange_counts(counts, mesh, name)
        for source, row in zip(axis.ranks, received.tolist(), strict=True):
            assert row == [2 * axis.index + 100 * source, 2 * axis.index + 1 + 100 * source]
        collectives.barrier(mesh, name)


def use_all_exchanges(mesh: Mesh) -> None:
    """Compare every exchange between pairs of ranks with its formula, on every axis."""
    for name, axis in mesh.axes.items():
        size, index = axis.size, axis.index
        # reduce_scatter: what place p sends for row r is 10 p + r, of one and of several dims.
        for shape in ((), (3,), (2, 5)):
            table = torch.stack([torch.full(shape, 10.0 * index + row) for row in range(size)])
            out = torch.empty(shape)
            collectives.reduce_scatter(table, out, mesh, name).wait()
            total = 10.0 * sum(range(size)) + size * index
            assert torch.equal(out, torch.full(shape, total)), (name, shape, out)
        # all_gather_into: from a tensor of its own, and from the row where it belongs.
        gathered = torch.empty(size, 4)
        collectives.all_gather_into(gathered, torch.full((4,), float(index)), mesh, name).wait()
        rows = torch.arange(size, dtype=torch.float32).repeat_interleave(4).view(size, 4)
        assert torch.equal(gathered, rows), (name, gathered)
        gathered = torch.empty(size, 4)
        gathered[index] = index + 1
        collectives.all_gather_into(gathered, gathered[index], mesh, name).wait()
        assert torch.equal(gathered, rows + 1), (name, gathered)
        send_in_order(mesh, name)
        expect_long_before(mesh, name)


def send_in_order(mesh: Mesh, name: str) -> None:
    """Send two messages around the ring; they arrive in the order of their sends."""
    axis = mesh.axes[name]
    if axis.size == 1:
        return
    after, before = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    first, second = torch.empty(3), torch.empty(3)
    receives = [collectives.recv(x, mesh, name, source=before) for x in (first, second)]
    sends = [
        collectives.send(torch.full((3,), number + axis.index), mesh, name, to=after)
        for number in (0.5, 100.5)
    ]
    for handle in receives + sends:
        handle.wait()
    assert (first[0].item(), second[0].item()) == (before + 0.5, before + 100.5), name


def expect_long_before(mesh: Mesh, name: str) -> None:
    """Post the receives of two exchanges before anything is sent; some messages are empty."""
    axis = mesh.axes[name]
    expected = []
    for turn in (0, 1):
        incoming = [torch.empty((source + axis.index + turn) % 3, 2) for source in range(axis.size)]
        blocks = collectives.expect_blocks(incoming, mesh, name, op=f"turn {turn}")
        expected.append((incoming, blocks))
    collectives.barrier(mesh, name)
    handles = []
    for turn, (incoming, blocks) in enumerate(expected):
        outgoing = [
            torch.full(((axis.index + to + turn) % 3, 2), 10.0 * axis.index + turn)
            for to in range(axis.size)
        ]
        if turn:  # a tensor for this rank itself is not copied when it is there already
            outgoing[axis.index] = incoming[axis.index].fill_(10.0 * axis.index + turn)
        handles.append(blocks.send(outgoing))
    for turn, (incoming, _) in enumerate(expected):
        handles[turn].wait()
        for source, block in enumerate(incoming):
            assert torch.equal(block, torch.full_like(block, 10.0 * source + turn)), name


def count_what_is_sent(mesh: Mesh) -> dict[str, dict[str, list[int]]]:
    """Return messages and bytes per class of link, by operation, and what the axes say of hosts."""
    world = mesh.axes["world"]
    x = torch.ones(world.size * 6)
    rows = list(range(world.size))  # none to the first

    def exchange_rows() -> None:
        sent, received = torch.ones(sum(rows), 5), torch.empty(mesh.rank * world.size, 5)
        recv_rows = [mesh.rank] * world.size
        collectives.exchange_rows(sent, received, rows, recv_rows, mesh, "world").wait()

    operations = {
        "exchange_counts": lambda: collectives.exchange_counts(x.view(-1, 6), mesh, "world"),
        "exchange_rows": exchange_rows,
        "reduce_scatter": lambda: collectives.reduce_scatter(
            x.view(-1, 6), torch.empty(6), mesh, "world"
        ).wait(),
        "ring": lambda: do_once(mesh, "ring", x, 0),
        # What a ring inside the backend moves is not counted.
        "all_reduce": lambda: collectives.all_reduce(x, mesh, "world").wait(),
    }
    found = {}
    for name, operation in operations.items():
        mesh.traffic.take()
        operation()
        counts = mesh.traffic.take()
        found[name] = {
            link.value: [counts.num_messages[link], counts.num_bytes[link]]
            for link in Link
            if counts.num_messages[link]
        }
    assert not mesh.traffic.num_messages, "take() leaves nothing"
    return found


def describe_hosts(mesh: Mesh) -> dict[str, Any]:
    """Return the hosts of each axis, and the class of the link to each of its places."""
    return {
        name: {
            "hosts": list(axis.hosts),
            "links": [axis.link_to(place).value for place in range(axis.size)],
        }
        for name, axis in mesh.axes.items()
    }


def wait_for_the_silent(mesh: Mesh, silent: int, op: str) -> dict[str, Any]:
    """Wait for a rank that has stopped itself, with a time-out of this wait alone."""
    collectives.barrier(mesh, "world")
    if mesh.rank == silent:
        os.kill(os.getpid(), signal.SIGSTOP)
        return {}
    x, started = torch.ones(3), time.perf_counter()
    if op == "recv":
        handle = collectives.recv(x, mesh, "world", source=silent)
    else:
        handle = collectives.all_reduce(x, mesh, "world")
    try:
        handle.wait(timeout_s=0.3)
    except CommError as error:
        return {
            "error": type(error).__name__, "sequence": error.sequence, "group": error.group,
            "op": error.op, "waited_s": time.perf_counter() - started, "aborted": mesh.is_aborted,
        }  # fmt: skip
    raise AssertionError("the silent rank has answered")


def sum_is_the_same_everywhere(mesh: Mesh) -> None:
    """Check the promise of bit-identical sums, on numbers whose sum depends on the order."""
    for size in (1, 1000, 100_003):
        generator = torch.Generator().manual_seed(mesh.rank)
        x = torch.randn(size, generator=generator) * 10 ** torch.randn(size, generator=generator)
        collectives.all_reduce(x, mesh, "world").wait()
        everywhere = collectives.all_gather(x, mesh, "world")
        assert all(torch.equal(other, x) for other in everywhere)


def exchange_rows(mesh: Mesh, rows: list[list[int]], dim: int, dtype: str) -> None:
    """Send rows[i][j] rows from i to j, and their gradients back."""
    kind = getattr(torch, dtype)
    sent_of = [sum(row) for row in rows]

    def block(source: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + source)
        return torch.randn(sent_of[source], dim, generator=generator).to(kind)

    send, recv = rows[mesh.rank], [row[mesh.rank] for row in rows]
    x = block(mesh.rank, 1).requires_grad_()
    y = collectives.all_to_all(x, send, recv, mesh, "world")
    parts = [block(source, 1).split(rows[source])[mesh.rank] for source in range(len(rows))]
    assert torch.equal(y, torch.cat(parts))
    # The gradient of row r is the row itself plus one: each must come home.
    y.backward(y.detach() + 1)
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach() + 1)


def join_and_leave(rank: int, world_size: int, port: int, cycles: int) -> dict[str, Any]:
    """Join and leave many times; return the times and what is left open."""

    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    times, before = [], (0, 0)
    for cycle in range(cycles):
        started = time.perf_counter()
        mesh = Mesh.join(
            rank=rank,
            world_size=world_size,
            store_host="127.0.0.1",
            store_port=port,
            generation=10_000 + cycle,
            expert_parallel=2,
            timeout_s=30.0,
        )
        collectives.barrier(mesh, "world")
        mesh.leave()
        times.append(time.perf_counter() - started)
        if cycle == 1:
            before = open_now()
    return {"times_s": times, "before": before, "after": open_now()}


def join_and_leave_as_ranks(mesh: Mesh, port: int, cycles: int) -> dict[str, Any]:
    """Take the rank from a first mesh, leave it, and cycle."""
    rank, world_size = mesh.rank, mesh.world_size
    mesh.leave()
    return join_and_leave(rank, world_size, port, cycles)


def do_once(mesh: Mesh, op: str, x: torch.Tensor, turn: int) -> None:
    """Take part in one operation of this kind."""
    world, ep = mesh.world_size, mesh.axes["ep"]
    if op == "all_reduce":
        collectives.all_reduce(x, mesh, "world").wait()
    elif op == "reduce_scatter":
        shares = x[: x.numel() // world * world].view(world, -1)
        collectives.reduce_scatter(shares, torch.empty_like(shares[0]), mesh, "world").wait()
    elif op == "all_gather":
        gathered = torch.empty(world, x.numel())
        collectives.all_gather_into(gathered, x, mesh, "world").wait()
    elif op == "broadcast":
        collectives.broadcast(x, mesh, "world", root=turn % world).wait()
    elif op == "ring":
        after, before = (mesh.rank + 1) % world, (mesh.rank - 1) % world
        received = collectives.recv(torch.empty_like(x), mesh, "world", source=before)
        collectives.send(x, mesh, "world", to=after).wait()
        received.wait()
    elif op == "all_to_all":
        rows = [x.numel() // ep.size] * ep.size
        collectives.all_to_all(x[: sum(rows), None], rows, rows, mesh, "ep")
        collectives.barrier(mesh, "dp")
    else:
        collectives.exchange_json({"turn": turn}, mesh, "checkpoint")


def lose_a_peer(mesh: Mesh, victim: int, op: str) -> dict[str, Any]:
    """Work until the victim kills itself; return what the others see, and when."""
    x = torch.ones(50_000)
    for turn in range(1_000_000):
        if mesh.rank == victim and turn == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        started = time.time()
        try:
            do_once(mesh, op, x, turn)
        except CommError as error:
            waited_s = time.time() - started
            # A worker may take its time to leave; nobody shall have to wait for that.
            time.sleep(1.0)
            mesh.leave()
            return {
                "error": type(error).__name__, "text": str(error), "waited_s": waited_s,
                "peer": error.peer, "group": error.group, "sequence": error.sequence,
            }  # fmt: skip
    raise AssertionError("the victim did not die")


def lose_a_peer_in_backward(mesh: Mesh, victim: int) -> str:
    """Die between the forward and the backward of an exchange; return what the others see."""
    rows = [4] * mesh.world_size
    x = torch.randn(4 * mesh.world_size, 3, requires_grad=True)
    y = collectives.all_to_all(x, rows, rows, mesh, "world")
    collectives.barrier(mesh, "world")
    if mesh.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        y.sum().backward()
    except CommError as error:
        return f"{type(error).__name__}: {error.op}"
    raise AssertionError("the backward ended without the victim")


def abort_a_wait(mesh: Mesh, silent: int) -> dict[str, Any]:
    """Wait for a rank that has stopped itself, until another thread aborts."""
    if mesh.rank == silent:
        os.kill(os.getpid(), signal.SIGSTOP)
        return {}
    aborted_at = []

    def abort() -> None:
        aborted_at.append(time.perf_counter())
        mesh.abort()

    timer = threading.Timer(0.5, abort)
    timer.start()
    try:
        collectives.all_reduce(torch.ones(10), mesh, "world").wait()
    except CommError as error:
        waited_s = time.perf_counter() - aborted_at[0]
        left = time.perf_counter()
        mesh.leave()
        left_s = time.perf_counter() - left
        return {"error": type(error).__name__, "waited_s": waited_s, "left_s": left_s}
    raise AssertionError("the silent rank has answered")


def leave_early(mesh: Mesh) -> dict[str, Any]:
    """Let rank 0 leave, while the others wait for it; unrelated sockets must stay open."""
    ours, theirs = socket.socketpair()
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    error_name = ""
    if mesh.rank != 0:
        try:
            collectives.barrier(mesh, "world")
        except CommError as error:
            error_name = type(error).__name__
    mesh.leave()
    mesh.leave()
    client.sendall(b"still")
    assert accepted.recv(5) == b"still"
    ours.sendall(b"here")
    assert theirs.recv(4) == b"here"
    try:
        collectives.barrier(mesh, "world")
    except CommError as error:
        return {"error": error_name, "after": type(error).__name__}
    raise AssertionError("a mesh that was left still communicates")


def leave_with_receives_posted(mesh: Mesh, port: int) -> dict[str, Any]:
    """Post receives, and let rank 0 leave instead of sending; then meet again."""
    incoming = [torch.empty(1000) for _ in range(mesh.world_size)]
    expected = collectives.expect_blocks(incoming, mesh, "world", op="expected")
    collectives.barrier(mesh, "world")
    error_name = ""
    if mesh.rank != 0:
        try:
            expected.send([torch.ones(1000) for _ in incoming]).wait()
        except CommError as error:
            error_name = f"{type(error).__name__} in {error.op}"
    mesh.leave()
    del expected, incoming
    again = Mesh.join(
        rank=mesh.rank,
        world_size=mesh.world_size,
        store_host="127.0.0.1",
        store_port=port,
        generation=mesh.generation + 1_000_000,
        timeout_s=20.0,
    )
    met = collectives.all_gather(torch.tensor([mesh.rank]), again, "world").flatten().tolist()
    again.leave()
    return {"error": error_name, "met": met}


def fail_to_join(port: int, rank: int, generation: int) -> dict[str, Any]:
    """Wait for ranks that do not come."""
    started = time.perf_counter()
    try:
        Mesh.join(
            rank=rank,
            world_size=2,
            store_host="127.0.0.1",
            store_port=port,
            generation=generation,
            timeout_s=1.0,
        )
    except JoinError as error:
        return {"text": str(error), "waited_s": time.perf_counter() - started}
    raise AssertionError("one rank alone has joined a mesh of two")


def generations_stay_apart(mesh: Mesh, port: int) -> dict[str, Any]:
    """Let each rank join a generation of its own at the same store; then both the same one."""
    rank = mesh.rank
    mesh.leave()
    result = fail_to_join(port, rank, 20_000 + rank)
    mesh = Mesh.join(
        rank=rank,
        world_size=2,
        store_host="127.0.0.1",
        store_port=port,
        generation=30_000,
        timeout_s=10.0,
    )
    met = collectives.all_gather(torch.tensor([rank]), mesh, "world").flatten().tolist()
    mesh.leave()
    return {**result, "met": met}


def abort_a_join(mesh: Mesh, port: int, delay_s: float) -> dict[str, Any]:
    """Wait for a rank that does not come, until another thread pulls the switch."""
    if mesh.rank == 1:
        return {}
    mesh.leave()
    switch = AbortSwitch()
    pulled = []

    def pull() -> None:
        pulled.append(time.perf_counter())
        switch.abort()

    if delay_s:
        threading.Timer(delay_s, pull).start()
    else:
        pull()
    try:
        Mesh.join(
            rank=0,
            world_size=2,
            store_host="127.0.0.1",
            store_port=port,
            generation=40_000,
            timeout_s=20.0,
            switch=switch,
        )
    except JoinError as error:
        waited_s = time.perf_counter() - pulled[0]
        return {"text": str(error), "waited_s": waited_s}
    raise AssertionError("one rank alone has joined a mesh of two")


def exchanges_of_two_axes_do_not_mix(mesh: Mesh) -> None:
    """Post receives on one axis, use another of the same ranks, then send on the first."""
    assert mesh.axes["ep"].group is mesh.axes["world"].group
    size = mesh.world_size
    early = [torch.full((4,), -1.0) for _ in range(size)]
    expected = row_exchange.expect_blocks(early, mesh, "ep")
    total = torch.empty(4)
    mine = torch.full((size, 4), 100.0 + mesh.rank)
    collectives.reduce_scatter(mine, total, mesh, "world").wait()
    assert torch.equal(total, torch.full((4,), sum(100.0 + rank for rank in range(size))))
    expected.send([torch.full((4,), float(mesh.rank)) for _ in range(size)]).wait()
    for source, block in enumerate(early):
        assert torch.equal(block, torch.full((4,), float(source))), (source, block)
