"""What each rank does in the tests of fused communication; run by rank_server.py."""

import os
import signal
import time
from typing import Any

import torch
from torch import Tensor, nn

from gangline.comm import collectives
from gangline.comm.errors import CommError
from gangline.comm.fusion import GradientBuckets, Slot
from gangline.comm.fusion_slices import FusedSlices, SliceLayout, slice_places
from gangline.comm.handle import Handle
from gangline.comm.mesh import Mesh


def factor(rank: int, microbatch: int, number: int) -> float:
    """Return the gradient of every element of parameter `number`; integers, so sums are exact."""
    return float(1 + 7 * rank + 3 * microbatch + number)


def reduce_in_buckets(
    mesh: Mesh,
    sizes: list[int],
    of_experts: list[bool],
    bucket_bytes: int,
    num_microbatches: int,
    missing: list[list[int]],
) -> list[Any]:
    """Compare buckets with one all-reduce per axis, and with the sums by hand.

    missing[rank] are the parameters that get no gradient there. Returns the buckets as started.
    """
    order = [i for i, is_expert in enumerate(of_experts) if not is_expert]
    order += [i for i, is_expert in enumerate(of_experts) if is_expert]
    grads = torch.zeros(sum(sizes))
    slots: dict[int, Slot] = {}
    end = 0
    for number in order:
        parameter = nn.Parameter(torch.zeros(sizes[number]))
        parameter.grad = grads[end : end + sizes[number]]
        axis = "dp" if of_experts[number] else "world"
        slots[number] = Slot(parameter, end, end + sizes[number], axis)
        end += sizes[number]
    started: list[Any] = []

    def reduce(bucket: Tensor, mesh: Mesh, axis: str) -> Handle:
        started.append([bucket.storage_offset(), bucket.numel(), axis])
        return collectives.all_reduce(bucket, mesh, axis)

    slots_in_order = [slots[number] for number in range(len(sizes))]
    buckets = GradientBuckets(grads, slots_in_order, bucket_bytes=bucket_bytes, reduce=reduce)

    def backward(microbatch: int) -> None:
        parts = [
            slots[number].parameter.sum() * factor(mesh.rank, microbatch, number)
            for number in reversed(range(len(sizes)))  # backward takes the last one first
            if number not in missing[mesh.rank]
        ]
        if parts:
            torch.stack(parts).sum().backward()

    for _ in range(2):  # the second step finds everything as the first did
        grads.zero_()
        started.clear()
        for microbatch in range(num_microbatches - 1):
            backward(microbatch)
            assert not started, "a reduction before the last microbatch"
        alone = grads.clone()
        with buckets.filling(mesh):
            backward(num_microbatches - 1)
        buckets.wait()
        for number, slot in slots.items():
            if number not in missing[mesh.rank]:
                alone[slot.start : slot.end] += factor(mesh.rank, num_microbatches - 1, number)
        border = sum(
            size for size, is_expert in zip(sizes, of_experts, strict=True) if not is_expert
        )
        collectives.all_reduce(alone[:border], mesh, "world").wait()
        collectives.all_reduce(alone[border:], mesh, "dp").wait()
        assert torch.equal(grads, alone)
        for number, slot in slots.items():
            wanted = sum(
                factor(rank, microbatch, number)
                for rank in mesh.axes[slot.axis].ranks
                for microbatch in range(num_microbatches)
                if number not in missing[rank]
            )
            assert grads[slot.start : slot.end].eq(wanted).all(), (number, wanted)
    buckets.close()
    slots_in_order[0].parameter.grad = None
    slots_in_order[0].parameter.sum().backward()  # nobody listens any more
    return started


class Chain(nn.Module):
    """Layers of one matrix each, all of the same size."""

    def __init__(self, num_layers: int, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrices = nn.ParameterList(
            nn.Parameter(torch.randn(dim, dim, generator=generator) / dim**0.5)
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        return x


def in_flat_buffer(chain: Chain) -> tuple[Tensor, list[Slot]]:
    """Give the chain gradients in a flat buffer, in the order of backward."""
    matrices = list(reversed(list(chain.matrices)))
    size = matrices[0].numel()
    grads = torch.zeros(size * len(matrices))
    slots = []
    for number, matrix in enumerate(matrices):
        place = slice(number * size, (number + 1) * size)
        matrix.grad = grads[place].view_as(matrix)
        slots.append(Slot(matrix, place.start, place.stop, "world"))
    return grads, slots


def overlap(mesh: Mesh, num_layers: int, dim: int) -> list[str]:
    """Wait inside of backward for the first bucket to be summed; return the order of events."""
    chain = Chain(num_layers, dim)
    grads, slots = in_flat_buffer(chain)
    events: list[str] = []
    handles: list[Handle] = []

    def reduce(bucket: Tensor, mesh: Mesh, axis: str) -> Handle:
        events.append(f"start {bucket.storage_offset() // dim**2}")
        handles.append(collectives.all_reduce(bucket, mesh, axis))
        return handles[-1]

    def first_matrix_is_next(_: Tensor) -> None:
        # Comes back only if the other ranks are reducing, too, and they are in their backward.
        handles[0].wait(timeout_s=20)
        events.append("first bucket is summed")
        assert slots[-1].parameter.grad is not None
        assert not slots[-1].parameter.grad.any(), "backward had ended"

    x = torch.ones(3, dim, requires_grad=True)
    y = torch.tanh(x @ chain.matrices[0])
    y.register_hook(first_matrix_is_next)
    for matrix in list(chain.matrices)[1:]:
        y = torch.tanh(y @ matrix)
    buckets = GradientBuckets(grads, slots, bucket_bytes=4 * dim**2, reduce=reduce)
    with buckets.filling(mesh):
        y.sum().backward()
        events.append("backward ends")
    buckets.wait()
    wanted = mesh.world_size * _gradients_alone(num_layers, dim)
    torch.testing.assert_close(grads, wanted)
    return events


def _gradients_alone(num_layers: int, dim: int) -> Tensor:
    chain = Chain(num_layers, dim)
    chain(torch.ones(3, dim)).sum().backward()
    grads = [matrix.grad for matrix in reversed(list(chain.matrices))]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def lose_a_peer_in_backward(mesh: Mesh, victim: int, sliced: bool) -> dict[str, Any]:
    """Let one rank die in the middle of backward; return what the others see, and when."""
    dim, num_layers = 64, 6
    chain = Chain(num_layers, dim)

    def die(grad: Tensor) -> None:
        if mesh.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    x = torch.ones(3, dim, requires_grad=True)
    started = time.perf_counter()
    try:
        if sliced:
            slices, _, _ = cut_layers(mesh, chain, dim)
            with slices.reducing():
                run_sliced(slices, chain, x, at_middle=lambda y: y.register_hook(die)).backward()
            slices.wait()
        else:
            grads, slots = in_flat_buffer(chain)
            buckets = GradientBuckets(grads, slots, bucket_bytes=0)
            y = x
            for number, matrix in enumerate(chain.matrices):
                y = torch.tanh(y @ matrix)
                if number == num_layers // 2:
                    y.register_hook(die)
            with buckets.filling(mesh):
                y.sum().backward()
            buckets.wait()
    except CommError as error:
        waited_s = time.perf_counter() - started
        time.sleep(0.5)  # nobody shall need this rank to leave
        return {"error": type(error).__name__, "op": error.op, "waited_s": waited_s}
    raise AssertionError("the step ended without the victim")


def cut_layers(mesh: Mesh, chain: Chain, dim: int) -> tuple[FusedSlices, Tensor, Tensor]:
    """Cut each layer of the chain over all ranks; return also this rank's weights and gradients."""
    matrices = list(reversed(list(chain.matrices)))
    layers = [{"m": matrix} for matrix in matrices]
    layouts = [SliceLayout.of({"m": matrix.shape}, mesh.world_size) for matrix in matrices]
    places = slice_places(layouts)
    weights = torch.zeros(places[-1].stop)
    for matrix, layout, place in zip(matrices, layouts, places, strict=True):
        rows, first = layout.own_rows(weights[place], "m", mesh.rank)
        rows.copy_(matrix.detach()[first : first + len(rows)])
    grads = torch.zeros_like(weights)
    slices = FusedSlices(layers, layouts, weights=weights, grads=grads, mesh=mesh, axis="world")
    return slices, weights, grads


def run_sliced(
    slices: FusedSlices, chain: Chain, x: Tensor, *, skip: int | None = None, at_middle: Any = None
) -> Tensor:
    """Run the chain, each layer whole only for its own product; return the sum of its output."""
    num_layers = len(chain.matrices)
    with slices.noting():
        for index, matrix in enumerate(chain.matrices):
            number = num_layers - 1 - index
            slices.fill(number)
            slices.start_gather(number - 1)
            if index != skip:
                x = torch.tanh(x @ matrix)
            if index == num_layers // 2 and at_middle is not None:
                at_middle(x)
            slices.release(number)
    return x.sum()


def slices_equal_one_process(
    mesh: Mesh,
    num_layers: int,
    dim: int,
    num_microbatches: int,
    skips: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Compare sums of sliced layers with those of one process that has every rank's tokens.

    In `skips`, a rank (JSON has text for keys) leaves out a layer, and so has no gradient of it.
    """
    inputs = [
        torch.randn(2, dim, generator=torch.Generator().manual_seed(100 * rank + microbatch))
        for rank in range(mesh.world_size)
        for microbatch in range(num_microbatches)
    ]
    skipped = {int(rank): layer for rank, layer in (skips or {}).items()}
    alone = Chain(num_layers, dim)
    for number, x in enumerate(inputs):
        for index, matrix in enumerate(alone.matrices):
            if index != skipped.get(number // num_microbatches):
                x = torch.tanh(x @ matrix)
        x.sum().backward()
    chain = Chain(num_layers, dim)
    slices, _, grads = cut_layers(mesh, chain, dim)
    num_whole: list[int] = []  # at each gradient
    for matrix in chain.matrices:
        matrix.register_post_accumulate_grad_hook(lambda _: num_whole.append(slices.num_whole))
    for step in range(2):
        grads.zero_()
        for microbatch in range(num_microbatches):
            x = inputs[mesh.rank * num_microbatches + microbatch].requires_grad_()
            loss = run_sliced(slices, chain, x, skip=skipped.get(mesh.rank))
            with slices.reducing():
                loss.backward()
        slices.wait()
        assert slices.num_whole == 0, f"layers are left whole after step {step}"
    gathered = collectives.all_gather(grads, mesh, "world")
    layouts = [SliceLayout.of({"m": m.shape}, mesh.world_size) for m in chain.matrices]
    for matrix, layout, place in zip(
        reversed(list(alone.matrices)), layouts, slice_places(layouts), strict=True
    ):
        whole = gathered[:, place].flatten()
        torch.testing.assert_close(layout.views(whole)["m"], matrix.grad)
    assert all(matrix.isnan().all() for matrix in chain.matrices), (
        "a layer that is not whole is NaN"
    )
    return {"most": max(num_whole)}
