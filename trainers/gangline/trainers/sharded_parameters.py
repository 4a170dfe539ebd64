"""Divide the dense parameters over all ranks: each keeps a slice of every layer.

A layer is whole only around its own forward and backward; a rank keeps 1/N of the dense weights,
gradients and optimizer state (comm/fusion_slices.py says how layers come and go). Experts stay
outside: they are divided over "ep" already, and have their own buckets over "dp".

The model stays what it is: `forward` of each block, and of the model, is wrapped on this instance.
What is outside of the blocks (embedding, last norm, output matrix) is whole from the model's
forward to its gradient.

In bf16 the casts that a forward makes of its weights are kept for backward as activations, 2 bytes
per dense parameter, as without slices.

Results: on one rank bit for bit those of the replicated model. On several, sums over ranks are in
the order of the ranks, and the norm of the gradient is added up from the slices.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gangline.comm.fusion import GradientBuckets
from gangline.comm.fusion_slices import FusedSlices
from gangline.comm.mesh import Mesh
from gangline.trainers.data_parallel import counted_once, squared_norms
from gangline.trainers.flat_layout import FlatLayout
from gangline.trainers.model import Transformer


class ShardedParameters:
    """Hold this rank's slices, and its experts, in two flat buffers.

    Nothing is there before `attach`; and what `attach` lays out has no values: fill it (`to_fill`)
    or load into it. The buffers are others after each `attach`.
    """

    layout: FlatLayout
    weights: Tensor
    grads: Tensor
    mesh: Mesh
    _slices: FusedSlices
    _buckets: GradientBuckets

    def __init__(self, model: Transformer, *, bucket_bytes: int) -> None:
        self._model = model
        self._bucket_bytes = bucket_bytes
        self._is_attached = False

    def attach(self, mesh: Mesh) -> None:
        """Cut all parameters anew, for the ranks of this mesh; the model moves to its device."""
        if self._is_attached:
            self._slices.close()
            self._buckets.close()
        self._is_attached = True
        self.mesh = mesh
        self.layout = FlatLayout(self._model, num_ranks=mesh.world_size, rank=mesh.rank)
        num_elements = self.layout.num_elements
        self.weights = torch.zeros(num_elements, dtype=torch.float32, device=mesh.device)
        self.grads = torch.zeros_like(self.weights)
        self._slices = FusedSlices(
            self.layout.layers,
            self.layout.slices,
            weights=self.weights,
            grads=self.grads,
            mesh=mesh,
            axis="world",
            held=self.layout.outside,
        )
        weights = self.layout.expert_views(self.weights)
        grads = self.layout.expert_views(self.grads)
        for name, expert in self.layout.experts.items():
            expert.data, expert.grad = weights[name], grads[name]
        self._buckets = GradientBuckets(
            self.grads, self.layout.slots(expert_axis="dp"), bucket_bytes=self._bucket_bytes
        )
        self._model.to(mesh.device)  # what is no parameter
        self._wrap_forwards()

    def _wrap_forwards(self) -> None:
        """Make every layer whole around its forward: this instance's, the classes stay."""
        outside = self.layout.outside
        numbers = [n for n in range(len(self.layout.layers)) if n not in outside]
        for number, block in zip(numbers, reversed(self._model.layers), strict=True):
            # The last block's forward is followed at once by its backward.
            is_last = number == numbers[0]
            forward = partial(type(block).forward, block)
            vars(block)["forward"] = partial(self._run_block, forward, number, is_last)
        vars(self._model)["forward"] = partial(self._run_model, outside, numbers[-1])

    def _run_model(self, outside: list[int], first_block: int, *args: Any, **kwargs: Any) -> Any:
        slices = self._slices
        slices.release_all()  # what a forward without backward has left; weights have changed since
        for number in (*outside, first_block):
            slices.start_gather(number)
        for number in outside:
            slices.fill(number)
        try:
            with slices.noting():
                return Transformer.forward(self._model, *args, **kwargs)
        finally:
            if not torch.is_grad_enabled():
                slices.release_all()

    def _run_block(
        self, forward: Callable[..., Any], number: int, is_last: bool, *args: Any, **kwargs: Any
    ) -> Any:
        slices = self._slices
        slices.fill(number)
        slices.start_gather(number - 1)
        try:
            return forward(*args, **kwargs)
        finally:
            if not (is_last and torch.is_grad_enabled()):
                slices.release(number)

    @contextmanager
    def backward(self, *, is_last: bool) -> Iterator[None]:
        """Run one microbatch's backward inside; its gradients are added to the slices.

        Communicates: one reduce-scatter per layer over "world" and, layers gathered again, one
        all-gather; in the last microbatch the experts' buckets over "dp".
        Raises: CommError, from backward.
        """
        buckets = self._buckets.filling(self.mesh) if is_last else nullcontext()
        with buckets, self._slices.reducing():
            yield

    def await_gradients(self) -> None:
        """Wait until `grads` are this rank's slices of the sums over all ranks, and its experts'.

        Raises: CommError.
        """
        self._slices.wait()
        self._buckets.wait()

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Return the squared norms of the summed gradients.

        Of what is the same on all ranks, which is nothing; and of what is not: the slices, and the
        experts where no other rank counts them.
        """
        slices, experts = squared_norms(self.grads, self.layout.num_dense)
        return torch.zeros_like(slices), slices + counted_once(experts, self.mesh)

    def whole_weights(self) -> Mapping[str, Tensor]:
        """Return the weights by name, experts as far as this rank holds them.

        Communicates: one all-gather per layer, when a weight of it is looked up after one of
        another layer; so all ranks look up the same ones in the same order.
        """
        return _WholeWeights(self.layout, self._slices, self.weights)

    def to_fill(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight by name, to be overwritten; this rank's part of it is kept."""
        for layer, place in zip(self.layout.slices, self.layout.places, strict=True):
            whole = self.weights.new_zeros(layer.num_elements)
            yield from layer.views(whole).items()
            self.weights[place] = whole.view(layer.num_ranks, -1)[self.mesh.rank]
        yield from self.layout.expert_views(self.weights).items()


class _WholeWeights(Mapping[str, Tensor]):
    """Gather the layer of whatever is looked up, and let the one before go."""

    def __init__(self, layout: FlatLayout, slices: FusedSlices, weights: Tensor) -> None:
        self._layout, self._slices = layout, slices
        self._experts = layout.expert_views(weights)
        self._layer_of = {n: i for i, layer in enumerate(layout.layers) for n in layer}
        self._current: int | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name in self._experts:
            return self._experts[name]
        number = self._layer_of[name]
        if number != self._current:
            self._slices.release_all()
            self._current = number
        return self._layout.slices[number].views(self._slices.whole(number))[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._layer_of, *self._experts])

    def __len__(self) -> int:
        return len(self._layer_of) + len(self._experts)
