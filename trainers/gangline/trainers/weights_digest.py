"""Hash a model's global weights, so that runs and layouts can be compared."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from gangline.comm.collectives import all_gather, exchange_json
from gangline.comm.mesh import Mesh
from gangline.trainers.model import is_expert


def weights_sha256(weights: Mapping[str, Tensor], mesh: Mesh) -> str:
    """Return the SHA-256 over all weights in the order of their names, experts gathered.

    Communicates: the experts over "ep", one tensor at a time; then the digests over "world".
    Raises: RuntimeError when the ranks do not hold the same weights, which would mean that a
    machine computes wrongly.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach()
        if is_expert(name):
            tensor = all_gather(tensor, mesh, "ep").flatten(0, 1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    mine = digest.hexdigest()
    everyone = exchange_json(mine, mesh, "world")
    if len(set(everyone)) > 1:
        raise RuntimeError(
            f"the ranks' weights differ at the end of the run: {everyone}; wanted one digest. "
            "Replicas are kept bit-identical, so suspect memory or processor of a node"
        )
    return mine
