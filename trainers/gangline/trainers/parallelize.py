"""Lay a model out over a mesh: in which order, and why.

1. Expert parallelism decides which experts this rank holds, so everything after it sees only
   those. The model was built for the degree; here it learns its place.
2. The dense parameters are replicated, or cut over all ranks. Both hold all that a rank owns in
   flat buffers, and bring the gradients to the ranks that own them while backward computes.
3. Weights are drawn (or loaded) for that place; by name and global expert number, so the layout
   does not show in them.
"""

import torch

from gangline.comm.collectives import all_reduce
from gangline.comm.mesh import Mesh
from gangline.trainers.checkpoint import Shard, State
from gangline.trainers.config import MeshConfig
from gangline.trainers.data_parallel import FlatParameters
from gangline.trainers.expert_parallel import apply_expert_parallel, first_local_expert
from gangline.trainers.gradient_compression import GradientCompression
from gangline.trainers.initialize import initialize
from gangline.trainers.model import Transformer
from gangline.trainers.optimizer import Optimizer
from gangline.trainers.sharded_parameters import ShardedParameters


def parallelize(model: Transformer, mesh: Mesh, config: MeshConfig) -> Transformer:
    """Give the model its place on the mesh."""
    return apply_expert_parallel(model, mesh, config.token_exchange)


def flat_parameters(
    model: Transformer,
    config: MeshConfig,
    device: torch.device,
    compression: GradientCompression | None = None,
) -> FlatParameters | ShardedParameters:
    """Put a model's parameters into flat buffers on the device, whole or in slices.

    Gradients of whole ones may be summed from compressed payloads; the config refuses it for
    slices.
    """
    if config.shard_parameters:
        # The model stays where it is until `attach` has cut it: a device need not hold it whole.
        return ShardedParameters(model, bucket_bytes=config.bucket_bytes)
    reduce = all_reduce if compression is None else compression.reduce
    flat = FlatParameters(model.to(device), bucket_bytes=config.bucket_bytes, reduce=reduce)
    if compression is not None:
        compression.attach(flat.grads)
    return flat


def reset(
    model: Transformer,
    flat: FlatParameters | ShardedParameters,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    seed: int,
) -> None:
    """Put model and optimizer at the start of a run."""
    initialize(model, seed, first_expert=first_local_expert(model, mesh), tensors=flat.to_fill())
    optimizer.reset()


def sharded_state(
    flat: FlatParameters | ShardedParameters, optimizer: Optimizer, mesh: Mesh
) -> State:
    """Name this rank's part of the run's tensors: weights and the optimizer's two averages.

    Views of the flat buffers: a load writes into them in place. Each is a run of rows of the
    global tensor: all of them where it is replicated; experts are rows of the global stack
    [E, ...].
    """
    state: State = {}
    for prefix, buffer in (
        ("model", flat.weights),
        ("optimizer.exp_avg", optimizer.averages),
        ("optimizer.exp_avg_sq", optimizer.squares),
    ):
        for name, (rows, first_row) in flat.layout.owned(buffer).items():
            num_rows = flat.layout.num_rows[name]
            if name in flat.layout.experts:
                first_row = mesh.axis_rank("ep") * num_rows
                num_rows *= mesh.axis_size("ep")
            state[f"{prefix}.{name}"] = Shard(
                rows,
                global_shape=(num_rows, *rows.shape[1:]),
                offset=(first_row, *(0 for _ in rows.shape[1:])),
            )
    return state
