"""Sum gradients over ranks from compressed payloads, and send later what a payload leaves out.

Each rank compresses its own gradient of a bucket, all gather the payloads, and each decodes and
adds them in the order of the ranks. With error feedback a rank compresses the sum of its gradient
g and its residual e, and keeps what was not sent:

    p = e + g;  send C(p);  e = p - C(p)

so over any number of steps what was sent and the residual add up to the gradients. A contractive
compressor needs this to converge; an unbiased one does not, and takes part in it divided by
1 + omega (comm/compressors.py, Shrunk).

The residual changes only where the weights do: a step that some rank does not commit leaves it as
it was (`commit`). It is part of the run's state. Every rank has its own, so a checkpoint holds
it under a first dim of the ranks: of a replicated parameter [world, *shape], at [rank]; of experts
[dp, E, ...], at [dp_index, first expert]. What counts is its sum over the ranks that share a
parameter. When their number changes from W to V, rank v takes over the residuals v, v + V, v + 2 V,
... of the old ones, and ranks beyond W begin with zero, which leaves the sum as it was
(`load_residual`).

On an axis of one rank nothing is sent and nothing compressed; a residual from before goes into the
gradient at once.

A gradient that is not finite travels as a payload that says so; every rank then gets NaN for the
bucket, and the vote on the step fails on all, as without compression.

Source: error feedback, Seide et al., Interspeech 2014; Stich et al., arXiv 1809.07599, algorithm 1;
Karimireddy et al., arXiv 1901.09847, algorithm 2. They put the learning rate into what is
compressed; we compress gradients, since the optimizer is AdamW on their sum.

N = ranks on the axis, B = bytes of a payload
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gangline.comm.collectives import all_gather_into, all_reduce
from gangline.comm.compression import Compressor, NonFiniteError, NonFinitePayloadError
from gangline.comm.compression_settings import CompressionSettings
from gangline.comm.compressors import contractive, make
from gangline.comm.handle import Handle
from gangline.comm.mesh import Mesh
from gangline.kernels.noise import derive_seed
from gangline.trainers.checkpoint import CheckpointError, CheckpointInfo, Shard, State, load
from gangline.trainers.commit import read_manifest
from gangline.trainers.flat_layout import FlatLayout

# Names of the residual's tensors in a checkpoint begin so.
RESIDUAL = "compression.residual."


class GradientCompression:
    """Hold a compressor and this rank's residual; `reduce` is for GradientBuckets.

    Of a step: `begin`, one `reduce` for each bucket, and `commit` if the weights change.
    """

    def __init__(self, settings: CompressionSettings, *, error_feedback: bool, seed: int) -> None:
        self._feeds_back = error_feedback
        compressor = make(settings)
        self.compressor: Compressor = contractive(compressor) if self._feeds_back else compressor
        self._seed = seed
        self._step = 0
        self._grads = self._residual = self._next_residual = torch.empty(0)
        self._reduced: list[tuple[int, int]] = []  # of this step, in the flat buffer
        self._reduced_before: list[tuple[int, int]] | None = None

    @property
    def residual(self) -> Tensor | None:
        """Return this rank's residual in the layout of the gradients; None without feedback.

        The tensor is another one after each `commit`.
        """
        return self._residual if self._feeds_back else None

    def attach(self, grads: Tensor) -> None:
        """Take the flat buffer of which buckets will be views, and begin with no residual."""
        self._grads = grads
        self._reduced_before = None
        if self._feeds_back:
            # Two, so that a step that does not commit costs no copy: `commit` swaps them.
            self._residual, self._next_residual = torch.zeros_like(grads), torch.zeros_like(grads)

    def reset(self) -> None:
        """Forget the residual, as before the first step."""
        self._residual.zero_()

    def begin(self, step: int) -> None:
        """Begin a step; its number goes into the choices by chance, so a resumed run repeats."""
        self._step = step
        self._reduced = []

    def reduce(self, bucket: Tensor, mesh: Mesh, axis: str) -> Handle:
        """Start to replace a bucket by the sum over the axis of what the ranks send of theirs.

        Communicates: one all-gather of N payloads; on one rank nothing.
        Raises: CommError; from `wait`, PayloadError when a peer's settings are others.
        Guarantees: the ranks of the axis get bit-identical sums, added in their order.
        """
        start = self._start_of(bucket)
        self._reduced.append((start, start + bucket.numel()))
        residual = self._residual[start : start + bucket.numel()]
        next_residual = self._next_residual[start : start + bucket.numel()]
        if mesh.axis_size(axis) == 1:
            if self._feeds_back:
                bucket.add_(residual)
                next_residual.zero_()
            return all_reduce(bucket, mesh, axis)
        vector = bucket
        if self._feeds_back:
            vector = torch.add(residual, bucket, out=next_residual)
        payload = self._compress(vector, derive_seed(self._seed, self._step, mesh.rank, start))
        if self._feeds_back:
            self._subtract(vector, payload)
        gathered_NB = payload.new_empty(mesh.axis_size(axis), payload.numel())
        handle = all_gather_into(gathered_NB, payload, mesh, axis)
        return handle.then(lambda: self._sum_into(bucket, gathered_NB))

    def commit(self) -> None:
        """Keep what this step has left; call it if and only if the weights take the step."""
        reduced = sorted(self._reduced)
        assert self._reduced_before in (None, reduced), "every step reduces the same buckets"
        self._reduced_before = reduced
        self._residual, self._next_residual = self._next_residual, self._residual

    def _start_of(self, bucket: Tensor) -> int:
        start = int(bucket.storage_offset()) - int(self._grads.storage_offset())
        is_inside = (
            bucket.untyped_storage().data_ptr() == self._grads.untyped_storage().data_ptr()
            and 0 <= start <= self._grads.numel() - bucket.numel()
        )
        assert is_inside, "a bucket is a view of the flat buffer that `attach` was given"
        return start

    def _compress(self, vector: Tensor, seed: int) -> Tensor:
        try:
            return self.compressor.compress(vector, seed=seed)
        except NonFiniteError:
            # The others wait for a payload of this length, and their vote must see it.
            return self.compressor.non_finite_payload(vector.numel(), vector.device)

    def _subtract(self, vector: Tensor, payload: Tensor) -> None:
        """Leave in `vector` what the payload does not carry."""
        try:
            self.compressor.accumulate(vector, payload, sign=-1)
        except NonFinitePayloadError:
            return  # this step cannot commit, so what is left does not matter

    def _sum_into(self, bucket: Tensor, gathered_NB: Tensor) -> None:
        bucket.zero_()
        for payload_B in gathered_NB:
            try:
                self.compressor.accumulate(bucket, payload_B)
            except NonFinitePayloadError:
                bucket.fill_(math.nan)


def make_compression(
    settings: CompressionSettings | None, *, error_feedback: bool, seed: int
) -> GradientCompression | None:
    """Return what optimizer.compression of the job asks for; None where that is null."""
    if settings is None:
        return None
    return GradientCompression(settings, error_feedback=error_feedback, seed=seed)


def residual_state(
    compression: GradientCompression | None, layout: FlatLayout, mesh: Mesh
) -> State:
    """Name this rank's residual for a checkpoint; ask again for each save. Empty without one.

    The tensors are views: a load writes into them in place.
    """
    state: State = {}
    if compression is None or compression.residual is None:
        return state
    for name, (rows, _) in layout.owned(compression.residual).items():
        is_expert = name in layout.experts
        axis, degree = ("dp", mesh.axis_size("ep")) if is_expert else ("world", 1)
        first_row = mesh.axis_rank("ep") * rows.shape[0] if is_expert else 0
        state[RESIDUAL + name] = Shard(
            rows.unsqueeze(0),
            global_shape=(mesh.axis_size(axis), rows.shape[0] * degree, *rows.shape[1:]),
            offset=(mesh.axis_rank(axis), first_row, *(0 for _ in rows.shape[1:])),
        )
    return state


def load_residual(
    info: CheckpointInfo, state: State, mesh: Mesh, *, report: Callable[[str], None]
) -> None:
    """Load the residual of a checkpoint, from any number of ranks, into a `residual_state`.

    A checkpoint without one leaves zeros, and one that is not asked for is dropped; both with a
    line in `report`.

    Communicates: the exchange of `load`, once where the number of ranks is the same or grew.
    Raises: as `load`.
    Guarantees: the sum over ranks is that of the checkpoint, and with the same ranks every bit.
    """
    saved = {name: tuple(t.shape) for name, t in read_manifest(info.path)[0].tensors.items()}
    for shard in state.values():
        shard.tensor.zero_()
    dropped = [name for name in saved if name.startswith(RESIDUAL) and name not in state]
    if dropped:
        report(
            f"the residual of {len(dropped)} parameters in {info.path} is dropped, since this job "
            "has no error feedback"
        )
    missing = [name for name in state if name not in saved]
    if missing:
        report(f"{info.path} has no residual of {len(missing)} parameters; they begin with zero")
    for name in state.keys() - missing:
        got, wanted = saved[name][1:], state[name].global_shape[1:]
        if got != wanted:
            raise CheckpointError(
                f"{name!r} is {got} per rank in the checkpoint, and {wanted} in this job; the "
                "model of the job file must be the one that wrote it"
            )
    folds = [-(-saved[name][0] // state[name].global_shape[0]) for name in state if name in saved]
    for fold in range(max(folds, default=0)):
        part: State = {}
        for name, shard in state.items():
            row = shard.offset[0] + fold * shard.global_shape[0]
            if name in saved and row < saved[name][0]:
                rows = shard.tensor if fold == 0 else torch.empty_like(shard.tensor)
                part[name] = Shard(rows, saved[name], (row, *shard.offset[1:]))
        load(info, part, mesh, strict=False)
        if fold > 0:
            for name, shard in part.items():
                state[name].tensor.add_(shard.tensor)
