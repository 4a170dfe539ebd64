"""Record communication without a compiler: Python kernels over torch's c10d operators.

All of `torch.distributed` ends in some twenty operators of torch's dispatcher. A kernel under the
key BackendSelect, under which they have none, runs before the group's own and sees what the C++
recorder sees, other libraries' C++ callers included. What differs:

- each operation costs tens of microseconds more, and takes the GIL;
- so does each end: it is stamped when Python's own wait returns, or by a callback that waits for
  the GIL. With the GIL held for long, ends come late, and operations that C++ code starts begin
  late;
- where NCCL moves the data there are no ends (`ends` is ENDS_UNKNOWN).
"""

import functools
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gangline.comm import ring_format as fmt
from gangline.comm.events import Op, dtype_name

# Under which no operator of c10d has a kernel, and which every call passes.
_KEY = "BackendSelect"
# More works than these that nobody waits for are given up as dropped.
_MAX_PENDING = 256
_NUM_DTYPES = 64


@dataclass(frozen=True)
class _Signature:
    """Where a c10d operator has what we record, as places in its arguments."""

    op: Op
    tensors: int | None
    peer: int | None = None  # other end, or root; a rank of the group


_SIGNATURES = {
    "broadcast_": _Signature(Op.BROADCAST, 0, 2),
    "allreduce_": _Signature(Op.ALL_REDUCE, 0),
    "allreduce_coalesced_": _Signature(Op.ALL_REDUCE_COALESCED, 0),
    "reduce_": _Signature(Op.REDUCE, 0, 3),
    "allgather_": _Signature(Op.ALL_GATHER, 1),
    "_allgather_base_": _Signature(Op.ALL_GATHER_SINGLE, 1),
    "allgather_coalesced_": _Signature(Op.ALL_GATHER_COALESCED, 1),
    "allgather_into_tensor_coalesced_": _Signature(Op.ALL_GATHER_COALESCED, 1),
    "gather_": _Signature(Op.GATHER, 1, 3),
    "scatter_": _Signature(Op.SCATTER, 0, 3),
    "reduce_scatter_": _Signature(Op.REDUCE_SCATTER, 1),
    "_reduce_scatter_base_": _Signature(Op.REDUCE_SCATTER_SINGLE, 1),
    "reduce_scatter_tensor_coalesced_": _Signature(Op.REDUCE_SCATTER_COALESCED, 1),
    "alltoall_": _Signature(Op.ALL_TO_ALL, 1),
    "alltoall_base_": _Signature(Op.ALL_TO_ALL_SINGLE, 1),
    "barrier": _Signature(Op.BARRIER, None),
    "monitored_barrier_": _Signature(Op.MONITORED_BARRIER, None),
    "send": _Signature(Op.SEND, 0, 2),
    "recv_": _Signature(Op.RECV, 0, 2),
    "recv_any_source_": _Signature(Op.RECV_ANY_SOURCE, 0),
}
_POINT_TO_POINT = (Op.SEND, Op.RECV, Op.RECV_ANY_SOURCE)


class Fallback:
    """torch with our kernels in it, from the first group to `close`."""

    def __init__(self) -> None:
        self._writers: dict[int, dict[str, _RingWriter]] = {}  # by group, by type of device
        self._pending: dict[int, _Pending] = {}  # by id of the Work, which it keeps alive
        self._library = torch.library.Library("c10d", "IMPL")
        for name, signature in _SIGNATURES.items():
            self._library.impl(name, self._kernel(name, signature), _KEY, with_keyset=True)
        self._functional = torch.library.Library("_c10d_functional", "IMPL")
        self._functional.impl("wait_tensor", self._wait_kernel(), _KEY, with_keyset=True)
        self._wait = dist.Work.wait
        setattr(dist.Work, "wait", self._stamping_wait(dist.Work.wait))  # noqa: B010 - for mypy

    def attach(self, group: Any, devices: Sequence[str], path: Path, ranks: Sequence[int]) -> None:
        """Record a group's operations on these types of device in the ring at `path`."""
        has_ends = group._get_backend(torch.device(devices[0])).name() != "nccl"
        writer = _RingWriter(path, ranks, group.size(), has_ends)
        writers = self._writers.setdefault(group._id(), {})
        if not writers:
            weakref.finalize(group, self._forget, group._id(), os.getpid())
        writers.update(dict.fromkeys(devices, writer))

    def close(self) -> None:
        """Take the kernels out again."""
        setattr(dist.Work, "wait", self._wait)  # noqa: B010 - for mypy
        self._library._destroy()
        self._functional._destroy()
        for group in list(self._writers):
            self._forget(group, os.getpid())

    def _forget(self, group: int, pid: int) -> None:
        for writer in self._writers.pop(group, {}).values():
            if os.getpid() == pid:
                writer.close()

    def _kernel(self, name: str, signature: _Signature) -> Callable[..., Any]:
        call = getattr(torch.ops.c10d, name).default
        arguments = [argument.name for argument in call._schema.arguments]
        group_place = arguments.index("process_group")
        is_async_place = arguments.index("async_op") if "async_op" in arguments else len(arguments)
        after = _after_ours()

        def kernel(keyset: Any, *arguments: Any) -> Any:
            group: Any = dist.ProcessGroup.unbox(arguments[group_place])
            writers = self._writers.get(group._id())
            if writers is None:
                return call.redispatch(keyset & after, *arguments)
            # Only a barrier has its tensor elsewhere: first, and not for its content.
            device, num_bytes, dtype = _size_of(arguments[signature.tensors or 0])
            if signature.tensors is None:
                num_bytes, dtype = 0, -1
            writer = writers.get(device) or next(iter(writers.values()))
            place = -1 if signature.peer is None else arguments[signature.peer]
            number = writer.begin(signature.op, place, num_bytes, dtype)
            try:
                result = call.redispatch(keyset & after, *arguments)
            except BaseException:
                writer.end(number, fmt.FAILED)
                raise
            work = result[-1] if isinstance(result, tuple) else result
            # Trailing arguments that have their default value are not handed over.
            is_async = len(arguments) <= is_async_place or arguments[is_async_place]
            if work is None:
                writer.end(number, fmt.DONE)
            elif writer.has_ends:
                work = dist.Work.unbox(work)
                self._follow(_Pending(work, writer, number, arguments[0]), is_async)
            return result

        return kernel

    def _wait_kernel(self) -> Callable[..., Any]:
        """Functional collectives wait in C++, and what they wait for is a tensor."""
        call = torch.ops._c10d_functional.wait_tensor.default

        def kernel(keyset: Any, tensor: Tensor) -> Any:
            result = call.redispatch(keyset & _after_ours(), tensor)
            for key, pending in list(self._pending.items()):
                if pending.fills(tensor):
                    self._pending.pop(key, None)
                    pending.end(fmt.DONE)
            return result

        return kernel

    def _follow(self, pending: "_Pending", is_async: bool) -> None:
        work, writer, number = pending.work, pending.writer, pending.number
        if is_async:
            try:
                future = work.get_future()
            except RuntimeError:  # it has none: gloo's send, recv and reduce_scatter
                pass
            else:
                future.add_done_callback(functools.partial(_end_by_future, writer, number))
                return
        self._pending[id(work)] = pending
        while len(self._pending) > _MAX_PENDING:
            self._pending.pop(next(iter(self._pending))).end(fmt.DROPPED)

    def _stamping_wait(self, wait: Callable[..., bool]) -> Callable[..., bool]:
        def stamping_wait(work: Any, *args: Any, **kwargs: Any) -> bool:
            pending = self._pending.get(id(work))
            if pending is None:
                return wait(work, *args, **kwargs)
            phase = fmt.FAILED
            try:
                is_done = wait(work, *args, **kwargs)
                phase = fmt.DONE if is_done else fmt.FAILED
            finally:
                self._pending.pop(id(work), None)
                pending.end(phase)
            return is_done

        return stamping_wait


@dataclass(frozen=True)
class _Pending:
    """A Work whose end shows in its wait."""

    work: Any
    writer: "_RingWriter"
    number: int
    filled: Any  # the tensors that the operation writes into, or lists of them

    def fills(self, tensor: Tensor) -> bool:
        """Whether it writes into this tensor's memory."""
        outputs = [self.filled] if isinstance(self.filled, Tensor) else self.filled
        return any(
            isinstance(each, Tensor) and each.data_ptr() == tensor.data_ptr() for each in outputs
        )

    def end(self, phase: int) -> None:
        source = -1
        if phase == fmt.DONE and self.writer.op_of(self.number) == Op.RECV_ANY_SOURCE:
            source = self.work._source_rank()
        self.writer.end(self.number, phase, fmt.END_AT_WAIT, source)


def _end_by_future(writer: "_RingWriter", number: int, future: Any) -> None:
    try:
        future.value()
    except Exception:  # noqa: BLE001 - it is for the waiter
        writer.end(number, fmt.FAILED)
    else:
        writer.end(number, fmt.DONE)


class _RingWriter:
    """Write a ring from Python; the same steps as in recorder_ring.hpp, under a lock.

    An aligned word of a memoryview is stored in one piece.
    """

    def __init__(self, path: Path, ranks: Sequence[int], group_size: int, has_ends: bool) -> None:
        self.has_ends = has_ends
        self._path = path
        self._ranks = ranks
        self._lock = threading.RLock()
        self._num_collectives = 0
        self._num_messages = {Op.SEND: [0] * group_size, Op.RECV: [0] * group_size}
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        header = fmt.HEADER.unpack_from(self._memory)
        self._first_word, self._mask = header[2] // 8, header[4] - 1
        self._words = memoryview(self._memory).cast("Q")
        ends = fmt.ENDS_STAMPED if has_ends else fmt.ENDS_UNKNOWN
        self._memory[fmt.ENDS_OFFSET : fmt.ENDS_OFFSET + 4] = ends.to_bytes(4, "little")

    def begin(self, op: Op, place: int, num_bytes: int, dtype: int) -> int:
        """Write that an operation is enqueued; return its number."""
        words = self._words
        peer = self._ranks[place] if 0 <= place < len(self._ranks) else -1
        with self._lock:
            match = self._next_match(op, place)
            number = words[_NUM_ENQUEUED] = words[_NUM_ENQUEUED] + 1
            at = self._first_word + ((number - 1) & self._mask) * 8
            words[at] = number << 3 | fmt.WRITING
            words[at + 1] = time.monotonic_ns()
            words[at + 2] = words[at + 3] = 0
            words[at + 4] = num_bytes
            words[at + 5] = match
            words[at + 6] = (peer & 0xFFFFFFFF) | op << 32 | (dtype & 0xFF) << 40
            words[at] = number << 3 | fmt.OPEN
        return number

    def end(self, number: int, phase: int, flags: int = 0, source: int = -1) -> None:
        """Write that an operation has ended; the first end counts."""
        words = self._words
        at = self._first_word + ((number - 1) & self._mask) * 8
        with self._lock:
            stamp = words[at]
            if stamp == number << 3 | fmt.OPEN:
                words[at] = number << 3 | fmt.ENDING
                words[at + 2] = time.monotonic_ns()
                peer = self._ranks[source] if 0 <= source < len(self._ranks) else None
                if peer is not None:
                    words[at + 6] = words[at + 6] & ~0xFFFFFFFF | peer
                words[at + 6] |= flags << 48
                words[at] = number << 3 | phase
            elif stamp >> 3 == number:
                return
            words[_NUM_ENDED] += 1
            words[_LAST_ENDED] = max(words[_LAST_ENDED], number)

    def op_of(self, number: int) -> int:
        """Return the kind of an operation that is still in the ring."""
        word: int = self._words[self._first_word + ((number - 1) & self._mask) * 8 + 6]
        return word >> 32 & 0xFF

    def close(self) -> None:
        """Mark the ring as given up and take its name away. The memory goes with this object."""
        self._words[_CLOSED_NS] = time.monotonic_ns()
        self._path.unlink(missing_ok=True)

    def _next_match(self, op: Op, place: int) -> int:
        if op not in _POINT_TO_POINT:
            self._num_collectives += 1
            return self._num_collectives
        counts = self._num_messages.get(op, [])
        if not 0 <= place < len(counts):
            return 0
        counts[place] += 1
        return counts[place]


def _after_ours() -> Any:
    """Return the keys at which an operator goes on after our kernel."""
    return torch._C._dispatch_keyset_full_after(getattr(torch._C.DispatchKey, _KEY))


# Places in a ring's words.
_CLOSED_NS, _NUM_ENQUEUED, _NUM_ENDED, _LAST_ENDED = 5, 8, 16, 17

_DTYPE_CODES = {
    getattr(torch, dtype_name(code)): code
    for code in range(_NUM_DTYPES)
    if hasattr(torch, dtype_name(code))
}


def _size_of(tensors: Any) -> tuple[str, int, int]:
    """Return the type of device, the bytes and the element type of a tensor or lists of them."""
    if not isinstance(tensors, Tensor):
        device, num_bytes, dtype = "", 0, -1
        for each in tensors:
            other = _size_of(each)
            num_bytes += other[1]
            if dtype < 0:
                device, dtype = other[0], other[2]
        return device, num_bytes, dtype
    if tensors.layout is not torch.strided:
        parts = [tensors._indices(), tensors._values()]
        num_bytes = sum(part.numel() * part.element_size() for part in parts)
    else:
        num_bytes = tensors.numel() * tensors.element_size()
    return tensors.device.type, num_bytes, _DTYPE_CODES.get(tensors.dtype, -1)
