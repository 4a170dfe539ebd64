"""Store checkpoints of torch.distributed.checkpoint (DCP) as safetensors under our commit protocol.

`dcp.save` and `dcp.load` can drive these classes; checkpoint.py drives them itself, because DCP's
own driver gathers and scatters pickled plans with every save. On the disk there is no pickle:
safetensors files, each hashed and synced as it is written, under a JSON manifest (commit.py).
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from gangline.trainers.checkpoint_plan import (
    DTYPE_NAMES,
    ShardSavePlanner,
    item_bytes,
    tensor_data,
)
from gangline.trainers.commit import (
    CheckpointError,
    CommitFence,
    CommitOutcome,
    FileRecord,
    begin,
    commit,
    discard,
    make_folder,
    require_room,
    write_durable,
)
from gangline.trainers.commit_layout import (
    Chunk,
    FileLayout,
    TensorLayout,
    file_layouts,
)
from gangline.trainers.commit_manifest import (
    MANIFEST_NAME,
    Manifest,
    decode,
    encode,
    tensors_to_json,
)

MAX_FILE_BYTES = 1 << 30
# Free space that a save asks for, as a multiple of its size: it shares the disk with logs and data.
ROOM_FACTOR = 1.2


class SafetensorsWriter(StorageWriter):
    """Write a step of a run as safetensors files and commit it.

    Call order as DCP has it. The layouts of all files follow from the global plan, so that a
    writer whose plan does not change writes step after step (`begin_step`) without planning.

    Communicates: nothing; who calls it brings the results of all ranks to `finish`.
    """

    def __init__(
        self,
        root: Path,
        *,
        fence: CommitFence,
        generation: int,
        axes: Mapping[str, int],
        config_digest: str,
        max_file_bytes: int = MAX_FILE_BYTES,
        room_factor: float = ROOM_FACTOR,
    ) -> None:
        self._root = Path(root)
        self._room_factor = room_factor
        self._fence = fence
        self._generation = generation
        self._axes = dict(axes)
        self._config_digest = config_digest
        self._max_file_bytes = max_file_bytes
        self._tensors: dict[str, TensorLayout] = {}
        self._tensors_json = ""
        self._files: dict[str, FileLayout] = {}
        self._world_size = 0
        self._folder = self._root
        self._step = 0
        self._extra: dict[str, Any] = {}
        self.outcome: CommitOutcome | None = None

    @property
    def num_bytes(self) -> int:
        """Return the size of all files of all ranks; known once planned."""
        return sum(len(f.header) + f.num_data_bytes for f in self._files.values())

    @property
    def folder(self) -> Path:
        """Return the temporary folder of the step under way."""
        return self._folder

    def begin_step(self, step: int, *, extra: Mapping[str, Any], attempt: str) -> None:
        """Name the next step; `attempt` is the same on all ranks and never used again."""
        self._step, self._extra, self.outcome = step, dict(extra), None
        self._folder = self._root / f".tmp-{step:08d}-{self._generation}-{attempt}"
        self._attempt = attempt

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return not os.fspath(checkpoint_id).startswith(".")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin step `checkpoint_id`, a number as text, when driven by `dcp.save`."""
        make_folder(self._root)
        if checkpoint_id is not None:
            name = os.path.basename(os.fspath(checkpoint_id))
            self.begin_step(int(name), extra={}, attempt=uuid.uuid4().hex)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        return

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give every item its file, and every plan the layouts of its files."""
        self._world_size = len(plans)
        chunks: dict[str, list[Chunk]] = {}
        described: dict[str, TensorWriteData] = {}
        names: list[list[str]] = []
        for rank, plan in enumerate(plans):
            names.append([])
            room = 0
            for item in plan.items:
                data, num_bytes = tensor_data(item), item_bytes(item)
                if not names[rank] or num_bytes > room:
                    part = len(names[rank])
                    names[rank].append(f"rank-{rank:05d}-{part:03d}.safetensors")
                    room = self._max_file_bytes
                room -= num_bytes
                chunk = Chunk(tuple(data.chunk.offsets), tuple(data.chunk.sizes), names[rank][-1])
                chunks.setdefault(item.index.fqn, []).append(chunk)
                described[item.index.fqn] = data
        self._tensors = {
            name: TensorLayout(
                DTYPE_NAMES[described[name].properties.dtype],
                tuple(described[name].size),
                tuple(parts),
            )
            for name, parts in sorted(chunks.items())
        }
        self._tensors_json = tensors_to_json(self._tensors)
        self._files = file_layouts(self._tensors)
        self._check_readable()
        return [
            replace(plan, storage_data=[self._files[name] for name in own])
            for plan, own in zip(plans, names, strict=True)
        ]

    def _check_readable(self) -> None:
        # Whatever would be refused at load is refused now, before there is something to lose.
        records = {
            name: FileRecord(len(f.header) + f.num_data_bytes, "0" * 64)
            for name, f in self._files.items()
        }
        decode(self._manifest(records), self._root / MANIFEST_NAME)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, each hashed and synced when this returns.

        Returns: a completed future with one result per file; `storage_data` is the WrittenFile.
        Raises: NoSpaceError before the first byte; OSError.
        """
        assert isinstance(planner, ShardSavePlanner), "SafetensorsWriter needs a ShardSavePlanner"
        require_room(self._root, self.num_bytes, factor=self._room_factor, folder=self._folder)
        begin(self._root, step=self._step, generation=self._generation, attempt=self._attempt)
        results = []
        for layout in cast("list[FileLayout]", plan.storage_data):
            image = planner.image(layout)
            written = write_durable(self._folder, layout.file, [layout.header, image])
            results.append(
                WriteResult(MetadataIndex(layout.file), written.record.num_bytes, written)
            )
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit what all ranks have written; `outcome` says what became of it."""
        self.commit(
            {r.storage_data.name: r.storage_data.record for of_rank in results for r in of_rank}
        )

    def commit(self, records: Mapping[str, FileRecord]) -> CommitOutcome:
        """Write the manifest and commit the step.

        Raises: as commit.commit; CheckpointError where a planned file has not arrived.
        """
        for name, layout in self._files.items():
            wanted = len(layout.header) + layout.num_data_bytes
            path = self._folder / name
            if name not in records or not path.exists() or path.stat().st_size != wanted:
                raise CheckpointError(
                    f"{path} is not there with its {wanted} bytes; the checkpoint folder must be "
                    "on storage that all workers share"
                )
        write_durable(self._folder, MANIFEST_NAME, [self._manifest(records)])
        self.outcome = commit(
            self._folder, step=self._step, generation=self._generation, fence=self._fence
        )
        return self.outcome

    def abandon(self) -> None:
        """Drop the step under way; called when no rank writes to it any more."""
        discard(self._folder)

    def _manifest(self, records: Mapping[str, FileRecord]) -> bytes:
        manifest = Manifest(
            step=self._step,
            generation=self._generation,
            world_size=self._world_size,
            axes=self._axes,
            config_digest=self._config_digest,
            created_at=time.time(),
            extra=self._extra,
            files={name: records[name] for name in self._files},
            tensors=self._tensors,
        )
        return encode(manifest, tensors_json=self._tensors_json)
