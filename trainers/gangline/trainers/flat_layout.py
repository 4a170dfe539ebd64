"""Say where each parameter lies in a rank's flat buffers of weights, gradients and averages.

    [slice of a layer][slice of a layer]...[experts]

The layers come in the order in which backward meets them, and of each first the matrices, then the
vectors, in that order, too. A rank holds a slice of each layer's dense parameters; where they are
replicated that is the whole, the slice of one rank. Experts are not cut; a rank has its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from gangline.comm.fusion import Slot
from gangline.comm.fusion_slices import SliceLayout, slice_places
from gangline.trainers.model import Transformer, is_expert

Parameters = dict[str, nn.Parameter]
_BLOCK = "layers."


@dataclass(frozen=True)
class Region:
    """A run of the flat buffers to which weight decay applies, or does not."""

    start: int
    end: int
    decays: bool


class FlatLayout:
    """Lay a model's parameters out for one of `num_ranks` that share each layer between them."""

    def __init__(self, model: Transformer, *, num_ranks: int = 1, rank: int = 0) -> None:
        in_order = in_backward_order(model)
        self.rank = rank
        self.layers = [_matrices_first(layer) for layer in in_order]
        self.outside = [  # of the model's blocks
            number
            for number, layer in enumerate(self.layers)
            if not any(name.startswith(_BLOCK) for name in layer)
        ]
        self.slices = [
            SliceLayout.of({name: p.shape for name, p in layer.items()}, num_ranks)
            for layer in self.layers
        ]
        self.places = slice_places(self.slices)
        self.num_dense = self.places[-1].stop
        self.num_rows = {name: p.shape[0] for layer in in_order for name, p in layer.items()}
        self._layer_experts = [
            {name: p for name, p in layer.items() if is_expert(name)} for layer in in_order
        ]
        self.experts = {n: p for experts in self._layer_experts for n, p in experts.items()}
        self._expert_layout = SliceLayout.of({n: p.shape for n, p in self.experts.items()}, 1)
        self.num_elements = self.num_dense + self._expert_layout.num_elements
        self.regions = [region for region in self._regions() if region.start < region.end]

    def owned(self, flat: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Return what a buffer of this layout holds of each parameter, and where that begins.

        A view of a run of its rows (of none where they are on other ranks), and the first row's
        number.
        """
        found = {name: (view, 0) for name, view in self.expert_views(flat).items()}
        for cut, place in zip(self.slices, self.places, strict=True):
            for name in cut.starts:
                found[name] = cut.own_rows(flat[place], name, self.rank)
        return found

    def expert_views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return this rank's experts in a buffer of this layout; views."""
        return self._expert_layout.views(flat[self.num_dense :])

    def slots(self, *, expert_axis: str, dense_axis: str | None = None) -> list[Slot]:
        """Place the gradients in the order in which backward fills them.

        Without a `dense_axis` those of experts alone; with one, in a layout of one rank.
        """
        slots = []
        for layer, experts, cut, place in zip(
            self.layers, self._layer_experts, self.slices, self.places, strict=True
        ):
            for name, p in experts.items():
                start = self.num_dense + self._expert_layout.starts[name]
                slots.append(Slot(p, start, start + p.numel(), expert_axis))
            if dense_axis is not None:
                for name, p in layer.items():
                    start = place.start + cut.starts[name]
                    slots.append(Slot(p, start, start + p.numel(), dense_axis))
        return slots

    def _regions(self) -> Iterator[Region]:
        for layer, cut, place in zip(self.layers, self.slices, self.places, strict=True):
            vectors = [cut.starts[name] for name, p in layer.items() if p.dim() == 1]
            num_decaying = min(vectors, default=cut.num_elements) - self.rank * cut.slice_len
            middle = place.start + min(max(num_decaying, 0), cut.slice_len)
            yield Region(place.start, middle, decays=True)
            yield Region(middle, place.stop, decays=False)
        yield Region(self.num_dense, self.num_elements, decays=True)


def in_backward_order(model: Transformer) -> list[Parameters]:
    """Return the model's layers, and the parameters of each, in the order of their gradients.

    What is outside of the blocks is a layer, too: an output matrix of its own with the norm before
    it comes first; the embedding last, as both of its gradients add up where the second comes.
    """
    named = dict(reversed(list(model.named_parameters())))
    blocks = [
        {name: p for name, p in named.items() if name.startswith(f"{_BLOCK}{number}.")}
        for number in reversed(range(len(model.layers)))
    ]
    top = {} if model.config.tie_embeddings else {n: named[n] for n in ("head", "final_norm")}
    bottom = {n: p for n, p in named.items() if not n.startswith(_BLOCK) and n not in top}
    return [layer for layer in (top, *blocks, bottom) if layer]


def _matrices_first(layer: Parameters) -> Parameters:
    dense = {name: p for name, p in layer.items() if not is_expert(name)}
    return dict(sorted(dense.items(), key=lambda item: item[1].dim() == 1))
