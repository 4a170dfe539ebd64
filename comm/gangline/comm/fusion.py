"""Sum gradients in buckets while backward still computes the next ones.

All gradients lie in one flat buffer, in the order in which backward fills them. The buffer is cut
into buckets; when the last parameter of a bucket has its gradient, the bucket's reduction starts,
and only what backward finishes last is waited for. What is reduced over other ranks (experts, over
their replicas) has buckets of its own.

With n parameters of b bytes in all, a latency of a per collective and B bytes per second, one
reduction per parameter costs n a + b / B, one for all of them a + b / B after backward; buckets
hide the b / B behind backward, all but that of the last bucket. Over links of 400 Mbit/s, with
8 MiB of gradients and a backward as long as their all-reduce, a step of 4 hosts takes 541 ms in
one bucket, 420 in buckets of 4 MiB, 316 of 1 MiB, 312 of 512 KiB, 321 of 256, 537 of 64 (the best
of nine on a busy machine; 252 would be perfect). Hence 1 MiB for `mesh.bucket_bytes`: half of it
gains nothing and pays twice the latencies.

Source: gradient buckets, Shen et al., "SE-MoE", arXiv 2205.10034, and Li et al., "PyTorch
Distributed", arXiv 2006.15704, section 3.2. Where we differ from the latter: the order is given
and not learnt in the first step, so that a resumed run cuts, and so rounds, as the one before it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from gangline.comm.collectives import Handle, all_reduce
from gangline.comm.mesh import Mesh

# Starts to sum a bucket over an axis, in place; the bucket is a view of the flat buffer, at its
# storage offset there.
Reduce = Callable[[Tensor, Mesh, str], Handle]


@dataclass(frozen=True)
class Slot:
    """Place one parameter's gradient in the flat buffer, and name the ranks that share it."""

    parameter: Tensor  # its `.grad` is the view of the buffer
    start: int
    end: int
    axis: str


@dataclass(frozen=True)
class Bucket:
    """A run of the flat buffer that is reduced at once."""

    start: int
    end: int
    axis: str
    num_slots: int


class InOrder:
    """Start numbered things in their order: each when it, and all before it, are complete.

    So every rank starts the same ones in the same order, also a rank on which something never
    becomes complete: `flush` starts the rest.
    """

    def __init__(self, num_parts: Sequence[int], start: Callable[[int], None]) -> None:
        self._num_parts = list(num_parts)
        self._start = start
        self.reset()

    def reset(self) -> None:
        """Begin again with nothing complete."""
        self._missing = list(self._num_parts)
        self._next = 0

    def mark(self, number: int) -> None:
        """Say that one more part of a thing is there."""
        if self._missing[number] == 0 or number < self._next:
            raise RuntimeError(
                f"a gradient of bucket or layer {number} came after its reduction had started, so "
                "it would be lost; run one backward per `with`"
            )
        self._missing[number] -= 1
        while self._next < len(self._missing) and self._missing[self._next] == 0:
            self._start_next()

    def flush(self, end: int | None = None) -> None:
        """Start what has not been started, of all or of those before `end`."""
        while self._next < (len(self._missing) if end is None else end):
            self._start_next()

    def _start_next(self) -> None:
        self._next += 1
        self._start(self._next - 1)


class GradientBuckets:
    """Reduce the gradients of a flat buffer, bucket by bucket, during backward.

    `slots` are in the order in which backward fills them; another order costs overlap and nothing
    else. Those of one axis lie one after the other in the buffer. A bucket holds `bucket_bytes` or
    one parameter, and at most a sixteenth more; with 0 each parameter is one by itself.

    Guarantees: the cut depends on the slots and `bucket_bytes` alone. With the default `reduce`
    replicas get bit-identical sums, the same from run to run.
    """

    def __init__(
        self,
        grads: Tensor,
        slots: Sequence[Slot],
        *,
        bucket_bytes: int,
        reduce: Reduce = all_reduce,
    ) -> None:
        self._grads = grads
        self._reduce = reduce
        self.buckets, bucket_of = _cut(slots, bucket_bytes // grads.element_size())
        self._order = InOrder([bucket.num_slots for bucket in self.buckets], self._start)
        self._mesh: Mesh | None = None  # None: gradients only add up
        self._handles: list[Handle] = []
        # Removed with `close`; a parameter may get other buckets.
        self._hooks = [
            slot.parameter.register_post_accumulate_grad_hook(partial(self._mark, slot, number))
            for slot, number in zip(slots, bucket_of, strict=True)
        ]

    @contextmanager
    def filling(self, mesh: Mesh) -> Iterator[None]:
        """Reduce what the one backward inside completes; outside, gradients only add up.

        With gradient accumulation that is the backward of the last microbatch. Parameters that it
        gives no gradient, on this rank or on all, are reduced as they are.

        Communicates: each bucket over its axis, in the same order on all ranks.
        Raises: CommError, from backward.
        """
        self._order.reset()
        self._handles.clear()  # of a backward that failed; its mesh is broken
        self._mesh = mesh
        try:
            yield
            self._order.flush()
        finally:
            self._mesh = None

    def wait(self) -> None:
        """Wait until all buckets are reduced.

        Raises: CommError. The buffer holds garbage then.
        """
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.wait()

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _mark(self, slot: Slot, number: int, parameter: Tensor) -> None:
        if self._mesh is None:
            return
        place = self._grads.data_ptr() + slot.start * self._grads.element_size()
        assert parameter.grad is not None, "torch calls this with a gradient"
        assert parameter.grad.data_ptr() == place, (
            "a gradient is not in its place in the flat buffer; zero gradients, never set them to "
            "None"
        )
        self._order.mark(number)

    def _start(self, number: int) -> None:
        assert self._mesh is not None, "buckets start inside of `filling`"
        bucket = self.buckets[number]
        part = self._grads[bucket.start : bucket.end]
        self._handles.append(self._reduce(part, self._mesh, bucket.axis))


def _cut(slots: Sequence[Slot], bucket_len: int) -> tuple[list[Bucket], list[int]]:
    """Cut the slots of each axis into runs; return the runs as they become full, and each slot's.

    A slot is never divided, as its gradient comes at once.
    """
    runs: list[list[int]] = []
    latest: dict[str, list[int]] = {}  # of each axis
    for number, slot in enumerate(slots):
        run = latest.get(slot.axis)
        if run is None or slot.end - slots[run[0]].start > _room(slots[run[0]], bucket_len):
            run = latest[slot.axis] = []
            runs.append(run)
        assert not run or slots[run[-1]].end <= slot.start, "the slots of an axis are in order"
        run.append(number)
    runs.sort(key=lambda run: run[-1])
    bucket_of = [0] * len(slots)
    for bucket, run in enumerate(runs):
        for number in run:
            bucket_of[number] = bucket
    buckets = [
        Bucket(slots[run[0]].start, slots[run[-1]].end, slots[run[0]].axis, len(run))
        for run in runs
    ]
    return buckets, bucket_of


def _room(first: Slot, bucket_len: int) -> int:
    # The sixteenth spares a vector behind a matrix, such as a norm, a collective of its own.
    largest = max(bucket_len, first.end - first.start) if bucket_len else 0
    return largest + largest // 16
