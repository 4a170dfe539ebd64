"""The values that a benchmarked operation gets, and what must come out of it, bit for bit.

Every element depends on the rank, its place and the repetition, so that a block in the wrong
place, of the wrong rank or of the run before is seen. Values are small whole numbers, chosen so
that every order of merging them gives the same bits in the type at hand. The exception is `avg`
over a number of ranks that is no power of two, where a backend may multiply by 1/N first: there
one unit in the last place per rank is allowed.

N = ranks, I = a run of elements of a buffer
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gangline.comm.mesh import Mesh
from gangline.comm.perf_case import Case, uneven_rows
from gangline.comm.perf_sizes import REDUCING

# The largest whole number up to which a type has every whole number.
_EXACT = {
    "int8": 127,
    "uint8": 255,
    "half": 2**11,
    "bfloat16": 2**8,
    "f8e4m3": 16,
    "f8e5m2": 8,
}
_EXACT_OTHERS = 2**24
_BLOCK = 1 << 20
_AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Values:
    """Fill the buffers of one case on one rank, and count what is wrong afterwards."""

    def __init__(self, case: Case, mesh: Mesh) -> None:
        self._case, self._mesh = case, mesh
        self._exact = _EXACT.get(case.type_name, _EXACT_OTHERS)
        self._n, self._rank = mesh.world_size, mesh.rank

    def fill(self, send: Tensor, recv: Tensor, *, repetition: int) -> None:
        """Clear what this rank receives, and write what it sends.

        Shapes: as for `perf_ops.start`.
        """
        recv.zero_()
        case = self._case
        match case.operation:
            case "broadcast" | "scatter":
                if self._rank == case.root:
                    self._write(send, source=0, offset=0, repetition=repetition)
            case "gather" | "sendrecv":
                offset = self._rank * send.numel()
                self._write(send, source=0, offset=offset, repetition=repetition)
            case _:
                self._write(send, source=self._rank, offset=0, repetition=repetition)

    def num_wrong(self, recv: Tensor, *, repetition: int, in_place: bool) -> int:
        """Count the elements of this rank's result that are not what they must be."""
        expected = torch.zeros_like(recv)
        if not self._expect(expected, repetition, in_place):
            return 0
        wrong = 0
        for found, wanted in zip(recv.split(_BLOCK), expected.split(_BLOCK), strict=True):
            wrong += int(self._differ(found, wanted).sum())
        return wrong

    def _expect(self, expected: Tensor, repetition: int, in_place: bool) -> bool:
        """Write what must come out; return False where nothing is promised."""
        case, n, rank = self._case, self._n, self._rank
        if case.operation in REDUCING:
            if case.operation == "reduce" and rank != case.root:
                return False  # torch uses the others' tensors as it likes
            offset = rank * expected.numel() if case.operation == "reduce_scatter" else 0
            self._write_reduced(expected, offset=offset, repetition=repetition)
            return True
        part = case.counts.parameter
        match case.operation:
            case "all_gather" | "hypercube":
                blocks = [(part, source, 0) for source in range(n)]
            case "alltoall":
                blocks = [(part, source, rank * part) for source in range(n)]
            case "alltoallv":
                blocks = self._uneven_blocks()
            case "broadcast":
                blocks = [(part, 0, 0)]
            case "scatter":
                blocks = [(part, 0, rank * part)]
            case "sendrecv":
                blocks = [(part, 0, (rank - 1) % n * part)]
            case "gather" if rank == case.root:
                blocks = [(n * part, 0, 0)]
            case _:
                # A rank that is not the root of a gather keeps what it had.
                own = expected[rank * part :][:part] if in_place else expected[:0]
                self._write(own, source=0, offset=rank * part, repetition=repetition)
                return True
        at = 0
        for size, source, offset in blocks:
            block = expected[at : at + size]
            self._write(block, source=source, offset=offset, repetition=repetition)
            at += size
        return True

    def _uneven_blocks(self) -> list[tuple[int, int, int]]:
        word, n = self._case.dtype.itemsize, self._n
        send_bytes, recv_bytes = uneven_rows(self._case, self._mesh)
        # Every rank sends the same sizes, turned by its number.
        per_distance = [send_bytes[(self._rank + d) % n] // word for d in range(n)]
        blocks = []
        for source in range(n):
            before = sum(per_distance[(place - source) % n] for place in range(self._rank))
            blocks.append((recv_bytes[source] // word, source, before))
        return blocks

    def _differ(self, found: Tensor, wanted: Tensor) -> Tensor:
        if self._case.redop == "avg" and self._n & (self._n - 1) and found.is_floating_point():
            allowed = self._n * torch.finfo(found.dtype).eps
            error = (found.double() - wanted.double()).abs()
            return ~(error <= allowed * wanted.double().abs())
        bits = _AS_BITS[found.element_size()]
        return found.view(bits) != wanted.view(bits)

    def _write(self, out: Tensor, *, source: int, offset: int, repetition: int) -> None:
        at = offset
        for block in out.split(_BLOCK):
            index_I = torch.arange(at, at + block.numel(), device=out.device)
            block.copy_(self._sent(index_I, source, repetition).to(_through(out.dtype)))
            at += block.numel()

    def _write_reduced(self, out: Tensor, *, offset: int, repetition: int) -> None:
        at = offset
        for block in out.split(_BLOCK):
            index_I = torch.arange(at, at + block.numel(), device=out.device)
            total_I = self._sent(index_I, 0, repetition)
            for source in range(1, self._n):
                other_I = self._sent(index_I, source, repetition)
                total_I = _MERGE[self._case.redop](total_I, other_I)
            if self._case.redop == "avg":
                total_I = total_I.double() / self._n
            block.copy_(total_I.to(_through(out.dtype)))
            at += block.numel()

    def _sent(self, index_I: Tensor, source: int, repetition: int) -> Tensor:
        """Return what rank `source` holds at these places, as int64."""
        case, n = self._case, self._n
        if case.operation not in REDUCING or case.redop in ("max", "min"):
            return _mix(index_I, 97 * repetition + source) % (min(self._exact, 1 << 16) + 1)
        if case.redop == "prod":
            # Up to three ranks hold a 2, the others a 1.
            turn = (_mix(index_I, 97 * repetition) + source) % n
            return 1 + (turn < _mix(index_I, 97 * repetition + 1) % 4).long()
        step = n if case.redop == "avg" else 1  # so that the mean is a whole number
        bound = self._exact // (n * step)
        if bound < 2:
            # Too many ranks for this type to add up other numbers than these.
            turn = (_mix(index_I, 97 * repetition) + source) % n
            return (turn < self._exact).long()
        return step * (_mix(index_I, 97 * repetition + source) % (bound + 1))


_MERGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "prod": torch.mul,
    "max": torch.maximum,
    "min": torch.minimum,
}


def _mix(index_I: Tensor, seed: int) -> Tensor:
    """Return 31 bits that look random of each index; no product exceeds 63 bits."""
    x_I = ((index_I & 0xFFFFFFFF) * 1103515245 + seed * 747796405 + (index_I >> 32)) & (2**62 - 1)
    x_I = ((x_I ^ (x_I >> 21)) & 0x7FFFFFFF) * 1597334677
    return (x_I >> 17) & 0x7FFFFFFF


def _through(dtype: torch.dtype) -> torch.dtype:
    """Return a type from which torch converts to this one; whole numbers up to 2**24 survive."""
    return torch.float32 if dtype.itemsize == 1 and dtype.is_floating_point else dtype
