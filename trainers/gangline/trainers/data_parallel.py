"""Keep replicas equal: sum each gradient over the ranks that hold the same parameter.

All weights live in one flat fp32 buffer and all gradients in another; the model's parameters and
their `.grad` are views. So backward writes each gradient into its place, a step is clipped by one
product and applied by one optimizer over a few long runs, and nothing is copied in between. The
buffer is cut into buckets in the order in which backward fills it (flat_layout.py), and a full
bucket is summed while backward goes on (comm/fusion.py): replicated parameters over "world",
experts over "dp".

Every rank's loss is a SUM over its tokens divided by the tokens of the whole step, so gradients
add up to those of one process whatever the division of the batch, even or not, also when a rank
has no tokens.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gangline.comm.collectives import all_reduce
from gangline.comm.fusion import GradientBuckets, Reduce
from gangline.comm.mesh import Mesh
from gangline.trainers.config import MeshConfig
from gangline.trainers.flat_layout import FlatLayout
from gangline.trainers.model import Transformer


class FlatParameters:
    """Hold a model's weights and gradients in two flat buffers, the same on all replicas.

    The model's parameters become views, with the values that they had; `.grad` must stay what it
    is here, so gradients are zeroed by `grads.zero_()` and never set to None.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        bucket_bytes: int = MeshConfig.model_fields["bucket_bytes"].default,
        reduce: Reduce = all_reduce,
    ) -> None:
        self.layout = FlatLayout(model)
        self.mesh = Mesh.single()
        device = model.embedding.device
        self.weights = torch.zeros(self.layout.num_elements, dtype=torch.float32, device=device)
        self.grads = torch.zeros_like(self.weights)
        weights, grads = self.layout.owned(self.weights), self.layout.owned(self.grads)
        for name, parameter in model.named_parameters():
            view, _ = weights[name]
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad, _ = grads[name]
        self._buckets = GradientBuckets(
            self.grads,
            self.layout.slots(dense_axis="world", expert_axis="dp"),
            bucket_bytes=bucket_bytes,
            reduce=reduce,
        )

    def attach(self, mesh: Mesh) -> None:
        """Name the mesh over which gradients are summed from now on."""
        self.mesh = mesh

    def backward(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Run one microbatch's backward inside; that of the last starts the sums over ranks.

        Communicates: buckets, replicated parameters over "world", experts over "dp".
        Raises: CommError, from backward.
        """
        return self._buckets.filling(self.mesh) if is_last else nullcontext()

    def await_gradients(self) -> None:
        """Wait until `grads` are sums over all ranks that hold the same parameters.

        Raises: CommError. Guarantees: replicas get bit-identical sums.
        """
        self._buckets.wait()

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Return the squared norms of the summed gradients.

        Of what is the same on all ranks; and of what is not, or zero where another rank counts it:
        of several replicas of an expert one does.
        """
        replicated, experts = squared_norms(self.grads, self.layout.num_dense)
        return replicated, counted_once(experts, self.mesh)

    def whole_weights(self) -> Mapping[str, Tensor]:
        """Return the weights by name, experts as far as this rank holds them."""
        return {name: view for name, (view, _) in self.layout.owned(self.weights).items()}

    def to_fill(self) -> Iterable[tuple[str, Tensor]]:
        """Yield every weight by name, to be overwritten."""
        return self.whole_weights().items()


def squared_norms(grads: Tensor, num_dense: int) -> tuple[Tensor, Tensor]:
    """Return the squared norms of the dense part of a flat buffer and of its experts, in fp64."""
    dense = torch.linalg.vector_norm(grads[:num_dense])
    experts = torch.linalg.vector_norm(grads[num_dense:])
    return dense.double().square(), experts.double().square()


def counted_once(of_experts: Tensor, mesh: Mesh) -> Tensor:
    """Return a sum over this rank's experts, or zero where another of their replicas counts it."""
    return of_experts if mesh.axis_rank("dp") == 0 else torch.zeros_like(of_experts)
