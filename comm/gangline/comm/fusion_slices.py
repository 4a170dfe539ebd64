"""Hold each layer's parameters in slices, one per rank, and make them whole for as long as needed.

A layer is one buffer of N slices of C elements; rank r keeps slice r, of weights and of gradients.
The whole is one all-gather, its gradient one reduce-scatter. C and the places of the parameters are
such that a cut between slices never falls inside a row of a parameter. So what a rank keeps of a
parameter is a run of whole rows, a box that a checkpoint can name; and the gathered buffer IS the
parameters, in one piece each, without a copy.

In a forward, layer i - 1 (the next one: layers are numbered as backward meets them) travels while
layer i computes. What autograd wants to keep of a gathered buffer becomes a note of where it was,
so the buffer can go when the layer's forward ends; reading the first note of layer i in backward
gathers it again, and layer i + 1 while i computes. When all gradients of a layer are there, its
weights go and its reduce-scatter starts: at the latest when backward comes to the next layer, so
that the order of all collectives is the same on every rank, whatever gradients it has.

Source: parameter slices fused per layer, Shen et al., "SE-MoE", arXiv 2205.10034; the slicing,
Rajbhandari et al., "ZeRO", arXiv 1910.02054, stage 3. Where we differ from other implementations:
cuts lie between rows, padding instead of a copy of each parameter after the gather.

N = ranks of the axis, C = elements of a slice
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gangline.comm.collectives import Handle, all_gather_into, reduce_scatter
from gangline.comm.fusion import InOrder
from gangline.comm.mesh import Mesh

# Each parameter starts on a cache line, as a tensor of its own would; in fp32.
_ALIGNMENT = 64 // 4


@dataclass(frozen=True)
class SliceLayout:
    """Place the parameters of a layer in one buffer of N slices. Pure."""

    num_ranks: int
    slice_len: int
    starts: Mapping[str, int]
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size], num_ranks: int) -> "SliceLayout":
        """Lay out parameters, of at least one dim each, in their order.

        A slice is a multiple of every row, so its length may exceed the N-th part by up to the
        least common multiple of the rows' lengths: 1408 elements for rows of 128 and 352.
        """
        starts, end, multiple = {}, 0, _ALIGNMENT
        for name, shape in shapes.items():
            unit = _ALIGNMENT if num_ranks == 1 else math.lcm(_ALIGNMENT, _row_len(shape))
            multiple = math.lcm(multiple, unit)
            starts[name] = _round_up(end, unit)
            end = starts[name] + shape.numel()
        slice_len = _round_up(-(-end // num_ranks), multiple)
        return cls(num_ranks, slice_len, starts, dict(shapes))

    @property
    def num_elements(self) -> int:
        """Return the length of the whole, padding included."""
        return self.num_ranks * self.slice_len

    def views(self, whole: Tensor) -> dict[str, Tensor]:
        """Cut a whole buffer into the parameters; views."""
        return {
            name: whole[start : start + shape.numel()].view(shape)
            for name, start in self.starts.items()
            for shape in (self.shapes[name],)
        }

    def own_rows(self, slice_C: Tensor, name: str, rank: int) -> tuple[Tensor, int]:
        """Return the rows of a parameter that lie in slice `rank`, a view, and the first's number.

        Shapes: slice_C [C], that slice; returns [rows, ...], of no rows where none lie in it.
        """
        start, shape = self.starts[name], self.shapes[name]
        row_len, offset = _row_len(shape), rank * self.slice_len
        first = max(start, offset)
        end = max(first, min(start + shape.numel(), offset + self.slice_len))
        if end == first:
            return slice_C.new_empty((0, *shape[1:])), 0
        rows = slice_C[first - offset : end - offset].view(-1, *shape[1:])
        return rows, (first - start) // row_len


def _row_len(shape: torch.Size) -> int:
    return math.prod(shape[1:])


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def slice_places(layouts: Sequence[SliceLayout]) -> list[slice]:
    """Return where each layer's slice lies when a rank's slices follow each other."""
    ends = list(itertools.accumulate(layout.slice_len for layout in layouts))
    return [slice(end - of.slice_len, end) for end, of in zip(ends, layouts, strict=True)]


@dataclass(frozen=True)
class _Note:
    """Stand for a tensor that autograd keeps, a view of a layer's gathered buffer."""

    layer: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Layer:
    """One layer's slice, and what is whole of it right now."""

    def __init__(
        self, layout: SliceLayout, parameters: Mapping[str, nn.Parameter], place: slice
    ) -> None:
        self.layout = layout
        self.parameters = parameters
        self.place = place  # of this rank's slice in the flat buffers
        self.whole: Tensor | None = None  # weights
        self.gathering: Handle | None = None
        self.whole_grads: Tensor | None = None
        self.grads: dict[str, Tensor] = {}  # views of whole_grads


@dataclass
class _Reduction:
    handle: Handle
    place: slice
    sum_C: Tensor
    whole_grads: Tensor  # read until the handle is done


class FusedSlices:
    """Keep 1/N of every layer's weights and gradients; make layers whole around their use.

    `layers` are in the order in which backward meets them, but for those in `held`, which stay
    whole from forward to their gradient: backward may meet them at any time. `weights` and `grads`
    are flat buffers of this rank; they begin with its slices, as `slice_places` says. The
    parameters' own data are NaN while a layer is not whole.

    Guarantees: the same collectives in the same order on all ranks whose forwards gathered the
    same layers. A parameter without a gradient, on this rank or on all, counts as zero; one whose
    gradient comes when backward is past its layer is a RuntimeError.
    """

    def __init__(
        self,
        layers: Sequence[Mapping[str, nn.Parameter]],
        layouts: Sequence[SliceLayout],
        *,
        weights: Tensor,
        grads: Tensor,
        mesh: Mesh,
        axis: str,
        held: Collection[int] = (),
    ) -> None:
        self._weights, self._grads = weights, grads
        self._mesh, self._axis = mesh, axis
        self._held = held
        self._layers = [
            _Layer(layout, parameters, place)
            for layout, parameters, place in zip(
                layouts, layers, slice_places(layouts), strict=True
            )
        ]
        self._layer_at: dict[int, int] = {}  # by the address of its gathered buffer
        self._order = InOrder([len(layer) for layer in layers], self._start_reduction)
        self._reached = -1  # by backward
        self._reducing: _Reduction | None = None
        self._absent = weights.new_full((), math.nan)
        self._hooks = []
        for number, layer in enumerate(self._layers):
            for name, parameter in layer.parameters.items():
                parameter.grad = None
                parameter.data = self._absent.expand(parameter.shape)
                hook = partial(self._take_gradient, number, name)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    @property
    def num_whole(self) -> int:
        """Return how many layers' weights are whole, or on their way."""
        return len(self._layer_at)

    def start_gather(self, number: int) -> None:
        """Start to make a layer whole, unless it is or there is no such layer.

        Communicates: one all-gather.
        """
        if not 0 <= number < len(self._layers) or self._layers[number].whole is not None:
            return
        layer = self._layers[number]
        layer.whole = self._weights.new_empty(layer.layout.num_elements)
        self._layer_at[layer.whole.data_ptr()] = number
        layer.gathering = all_gather_into(
            layer.whole.view(layer.layout.num_ranks, -1),
            self._weights[layer.place],
            self._mesh,
            self._axis,
        )

    def whole(self, number: int) -> Tensor:
        """Return a layer's whole buffer; gather it unless it is there. Raises: CommError."""
        self.start_gather(number)
        layer = self._layers[number]
        if layer.gathering is not None:
            gathering, layer.gathering = layer.gathering, None
            gathering.wait()
        assert layer.whole is not None, "start_gather has made it"
        return layer.whole

    def fill(self, number: int) -> None:
        """Give a layer's parameters their values. Raises: CommError."""
        layer = self._layers[number]
        for name, view in layer.layout.views(self.whole(number)).items():
            layer.parameters[name].data = view

    def release(self, number: int) -> None:
        """Let a layer's whole weights go."""
        layer = self._layers[number]
        if layer.whole is None:
            return
        self.whole(number)  # nothing may write into it any more
        del self._layer_at[layer.whole.data_ptr()]
        layer.whole = None
        for parameter in layer.parameters.values():
            parameter.data = self._absent.expand(parameter.shape)

    def release_all(self) -> None:
        """Let all whole weights go, as the slices have changed or will."""
        for number in range(len(self._layers)):
            self.release(number)

    def noting(self) -> AbstractContextManager[None]:
        """Let autograd keep notes instead of gathered buffers, for the forward inside."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        number = self._layer_at.get(tensor.untyped_storage().data_ptr())
        if number is None:
            return tensor
        return _Note(number, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Note):
            tensor: Tensor = kept
            return tensor
        if kept.layer not in self._held:
            self._reach(kept.layer)
        return self.whole(kept.layer).as_strided(kept.size, kept.stride, kept.offset)

    def _reach(self, number: int) -> None:
        """Take the steps of backward up to this layer, layer by layer."""
        while self._reached < number:
            self._reached += 1
            self._order.flush(self._reached)
            for needed in (self._reached, self._reached + 1):
                if needed not in self._held:
                    self.start_gather(needed)

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Add this rank's slices of the gradients of the one backward inside to the flat buffer.

        The last sums come with `wait`. Communicates: one reduce-scatter per layer. Raises:
        CommError, from backward.
        """
        for layer in self._layers:  # of a backward that failed
            layer.whole_grads, layer.grads = None, {}
        self._order.reset()
        self._reached = -1
        yield
        self._reach(len(self._layers) - 1)
        self._order.flush()

    def wait(self) -> None:
        """Wait for the reduction under way. Raises: CommError."""
        if self._reducing is not None:
            done, self._reducing = self._reducing, None
            done.handle.wait()
            self._grads[done.place].add_(done.sum_C)

    def close(self) -> None:
        """Let go of the parameters; they keep their shapes and are NaN. Waits for nobody."""
        for layer in self._layers:
            layer.gathering = None  # its mesh may be broken or left
        self.release_all()
        for hook in self._hooks:
            hook.remove()

    def _take_gradient(self, number: int, name: str, parameter: Tensor) -> None:
        grads = self._gradients_of(number)
        assert parameter.grad is not None, "torch calls this with a gradient"
        grads[name].copy_(parameter.grad)
        parameter.grad = None
        self._order.mark(number)

    def _gradients_of(self, number: int) -> dict[str, Tensor]:
        layer = self._layers[number]
        if layer.whole_grads is None:
            # Zeros for the padding, and for parameters that get no gradient.
            layer.whole_grads = self._grads.new_zeros(layer.layout.num_elements)
            layer.grads = layer.layout.views(layer.whole_grads)
        return layer.grads

    def _start_reduction(self, number: int) -> None:
        # One at a time, so that at most two layers' gradients are whole.
        self.wait()
        self.release(number)
        self._gradients_of(number)
        layer = self._layers[number]
        assert layer.whole_grads is not None, "_gradients_of has made it"
        sum_C = self._grads.new_empty(layer.layout.slice_len)
        handle = reduce_scatter(
            layer.whole_grads.view(layer.layout.num_ranks, -1), sum_C, self._mesh, self._axis
        )
        self._reducing = _Reduction(handle, layer.place, sum_C, layer.whole_grads)
        layer.whole_grads, layer.grads = None, {}
