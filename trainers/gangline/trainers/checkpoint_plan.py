"""Plan which rank writes, and which reads, which box of which tensor.

These are planners of torch.distributed.checkpoint (DCP). A state is a dict of `Shard`: this rank's
chunk of each tensor, and where it lies. The saved chunks and the asked-for chunks need not match:
a load cuts whatever it needs out of whatever was saved.

A rank stages what it has to write into one buffer per file, in the order of the file. The buffer
is the data part of the file: one hash, one write, one sync.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from gangline.trainers.commit import CheckpointError
from gangline.trainers.commit_layout import FileLayout

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Shard:
    """Hold this rank's chunk of a tensor; a replicated tensor is a shard that is the whole.

    Shapes: tensor [*local], inside global_shape at offset, all of the same number of dims.
    """

    tensor: Tensor  # CPU or CUDA; a load writes into it in place
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Shard:
        """Make the shard of a replicated tensor."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.dim())


State = dict[str, Shard]


def check_shard(name: str, shard: Shard) -> None:
    """Raise ValueError unless the chunk lies inside its tensor and has a dtype that we store."""
    local = tuple(shard.tensor.shape)
    if not len(local) == len(shard.offset) == len(shard.global_shape) or any(
        o < 0 or o + s > whole
        for o, s, whole in zip(shard.offset, local, shard.global_shape, strict=True)
    ):
        raise ValueError(
            f"the shard of {name!r} at {shard.offset} of shape {local} is outside of its tensor "
            f"{shard.global_shape}"
        )
    if shard.tensor.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype) for dtype in DTYPE_NAMES)
        raise ValueError(f"{name!r} is {shard.tensor.dtype}; a checkpoint stores {known}")


def is_stored(shard: Shard) -> bool:
    """Tell whether a shard has something to write; of an empty tensor, the whole has."""
    return shard.tensor.numel() > 0 or tuple(shard.tensor.shape) == shard.global_shape


class ShardSavePlanner(SavePlanner):
    """Plan which rank writes which shard, and stage those that this rank writes.

    Replicated shards are written once, by the rank with the least to write so far, largest first.
    Every rank can compute the global plan by itself from the local plans of all: it depends on
    nothing else.
    """

    def __init__(self) -> None:
        self._state: State = {}
        self._views: list[tuple[str, Tensor]] = []
        self._images: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        self._copy_stream: torch.cuda.Stream | None = None
        self._is_staged = False

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._state = state_dict
        self._is_staged = False

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, shard in self._state.items():
            check_shard(name, shard)
            if is_stored(shard):
                items.append(write_item(name, shard))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        holders: dict[MetadataIndex, list[int]] = {}
        items: dict[MetadataIndex, WriteItem] = {}
        tensors: dict[str, TensorStorageMetadata] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                self._agree(items.setdefault(item.index, item), item, rank)
                holders.setdefault(item.index, []).append(rank)
        order = sorted(items.values(), key=lambda i: (-item_bytes(i), i.index.fqn, i.index.offset))
        plans: list[list[WriteItem]] = [[] for _ in all_plans]
        load_bytes = [0] * len(all_plans)
        for item in order:
            rank = min(holders[item.index], key=lambda r: (load_bytes[r], r))
            plans[rank].append(item)
            load_bytes[rank] += item_bytes(item)
            data = tensor_data(item)
            first = tensors.setdefault(
                item.index.fqn, TensorStorageMetadata(data.properties, data.size, [])
            )
            if (first.size, first.properties.dtype) != (data.size, data.properties.dtype):
                raise CheckpointError(
                    f"{item.index.fqn!r} is {data.properties.dtype} {tuple(data.size)} on one rank "
                    f"and {first.properties.dtype} {tuple(first.size)} on another"
                )
            first.chunks.append(data.chunk)
        return [SavePlan(items) for items in plans], Metadata(dict(tensors))

    @staticmethod
    def _agree(first: WriteItem, item: WriteItem, rank: int) -> None:
        if first.tensor_data != item.tensor_data:
            raise CheckpointError(
                f"rank {rank} holds another shard of {item.index.fqn!r} at {item.index.offset} "
                f"than the ranks before it: {item.tensor_data} and {first.tensor_data}"
            )

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Allocate the buffers of this rank's files; `new_plan` carries their layouts."""
        pinned = any(shard.tensor.is_cuda for shard in self._state.values())
        self._views, self._images = [], {}
        for layout in cast("list[FileLayout]", new_plan.storage_data):
            image = torch.empty(layout.num_data_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._images[layout.file] = image
            for entry in layout.entries:
                dtype = self._state[entry.name].tensor.dtype
                view = image[entry.start : entry.stop].view(dtype).view(entry.chunk.shape)
                self._views.append((entry.name, view))
        return new_plan

    def stage(self, state: State) -> None:
        """Copy what this rank writes into the buffers; the caller may change `state` afterwards.

        On CUDA the copy runs on a stream of its own. The caller's stream waits for it on the
        device, because its next kernels change the weights; the host does not wait.
        """
        on_cuda = [shard.tensor for shard in state.values() if shard.tensor.is_cuda]
        with torch.no_grad():
            if not on_cuda:
                for name, view in self._views:
                    view.copy_(state[name].tensor)
            else:
                self._stage_from_cuda(state, on_cuda[0].device)
        self._is_staged = True

    def _stage_from_cuda(self, state: State, device: torch.device) -> None:
        current = torch.cuda.current_stream(device)
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream(device)
        self._copy_stream.wait_stream(current)
        with torch.cuda.stream(self._copy_stream):
            for name, view in self._views:
                view.copy_(state[name].tensor, non_blocking=True)
            self._copied = self._copy_stream.record_event()
        current.wait_event(self._copied)

    def image(self, layout: FileLayout) -> memoryview:
        """Return the data part of a file, complete."""
        if not self._is_staged:
            self.stage(self._state)
        if self._copied is not None:
            self._copied.synchronize()
        return memoryview(cast(Any, self._images[layout.file].numpy()))

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._state[write_item.index.fqn].tensor.detach()


class ShardLoadPlanner(LoadPlanner):
    """Plan which saved boxes fill this rank's shards, whatever the layout of the save was."""

    def __init__(self) -> None:
        self._state: State = {}
        self._metadata: Metadata | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self._state = state_dict
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """Plan every read before the first one.

        Raises: CheckpointError naming the tensor that the checkpoint lacks, or has otherwise.
        """
        assert self._metadata is not None, "set_up_planner comes first, with the metadata"
        items: list[ReadItem] = []
        for name, shard in self._state.items():
            check_shard(name, shard)
            saved = self._metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise CheckpointError(
                    f"the checkpoint has no tensor {name!r}; model and optimizer of the job file "
                    "must be those that wrote it"
                )
            got = (saved.properties.dtype, tuple(saved.size))
            if got != (shard.tensor.dtype, shard.global_shape):
                raise CheckpointError(
                    f"{name!r} is {got[0]} {got[1]} in the checkpoint, and {shard.tensor.dtype} "
                    f"{shard.global_shape} in this job; the model of the job file must be the one "
                    "that wrote it"
                )
            if shard.tensor.numel():
                wanted = ChunkStorageMetadata(torch.Size(shard.offset), shard.tensor.shape)
                items += create_read_items_for_chunk_list(name, saved, [wanted])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("a checkpoint of ours holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of this rank's tensor that `read_item` fills."""
        shard = self._state[read_item.dest_index.fqn]
        return narrow(shard.tensor.detach(), read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return


def narrow(tensor: Tensor, offset: torch.Size, shape: torch.Size) -> Tensor:
    """Return the box of `tensor` at `offset`, as a view."""
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def write_item(name: str, shard: Shard) -> WriteItem:
    """Describe a shard to DCP."""
    return WriteItem(
        index=MetadataIndex(name, shard.offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(shard.offset), shard.tensor.shape),
            properties=TensorProperties(dtype=shard.tensor.dtype),
            size=torch.Size(shard.global_shape),
        ),
    )


def tensor_data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None, "every item of ours is a shard of a tensor"
    return item.tensor_data


def item_bytes(item: WriteItem) -> int:
    data = tensor_data(item)
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def plan_to_json(plan: SavePlan) -> list[list[Any]]:
    """Encode a local plan for the wire; `plan_from_json` is the inverse."""
    rows = []
    for item in plan.items:
        data = tensor_data(item)
        dtype = DTYPE_NAMES[data.properties.dtype]
        rows.append(
            [item.index.fqn, dtype, [*data.size], [*data.chunk.offsets], [*data.chunk.sizes]]
        )
    return rows


def plan_from_json(rows: list[list[Any]]) -> SavePlan:
    """Decode a local plan of another rank; tensors become descriptions without data."""
    items = []
    for name, dtype, size, offset, shape in rows:
        tensor = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        items.append(write_item(name, Shard(tensor, tuple(size), tuple(offset))))
    return SavePlan(items)
