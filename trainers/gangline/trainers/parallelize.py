"""Lay a model out over a mesh: in which order, and why.

1. Expert parallelism decides which experts this rank holds, so everything after it sees only
   those. The model was built for the degree; here it learns its place.
2. Weights are drawn (or loaded) for that place; by global expert number, so the layout does not
   show in them.

Data parallelism needs no step here: the flat buffers are made with the model, and each reduction
names its axis of the mesh.
"""

from torch import Tensor

from gangline.comm.mesh import Mesh
from gangline.trainers.checkpoint import Shard, State
from gangline.trainers.data_parallel import FlatParameters
from gangline.trainers.expert_parallel import apply_expert_parallel, first_local_expert
from gangline.trainers.initialize import initialize
from gangline.trainers.model import Transformer, is_expert
from gangline.trainers.optimizer import Optimizer


def parallelize(model: Transformer, mesh: Mesh) -> Transformer:
    """Give the model its place on the mesh."""
    return apply_expert_parallel(model, mesh)


def reset(model: Transformer, optimizer: Optimizer, mesh: Mesh, *, seed: int) -> None:
    """Put model and optimizer at the start of a run."""
    initialize(model, seed, first_expert=first_local_expert(model, mesh))
    optimizer.reset()


def sharded_state(flat: FlatParameters, optimizer: Optimizer, mesh: Mesh) -> State:
    """Name this rank's part of the run's tensors: weights and the optimizer's two averages.

    Views of the flat buffers: a load writes into them in place. Experts are shards of the global
    stack [E, ...], at this rank's first expert.
    """
    state: State = {}
    for prefix, buffer in (
        ("model", flat.weights),
        ("optimizer.exp_avg", optimizer.averages),
        ("optimizer.exp_avg_sq", optimizer.squares),
    ):
        for name, tensor in flat.named_views(buffer).items():
            state[f"{prefix}.{name}"] = shard(name, tensor, mesh)
    return state


def shard(name: str, tensor: Tensor, mesh: Mesh) -> Shard:
    """Say where this rank's chunk of a parameter lies in the global tensor."""
    if not is_expert(name):
        return Shard.whole(tensor)
    num_local, *rest = tensor.shape
    place, degree = mesh.axis_rank("ep"), mesh.axis_size("ep")
    return Shard(
        tensor,
        global_shape=(num_local * degree, *rest),
        offset=(num_local * place, *(0 for _ in rest)),
    )
