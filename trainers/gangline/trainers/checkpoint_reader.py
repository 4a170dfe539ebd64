"""Read a committed checkpoint for torch.distributed.checkpoint (DCP), trusting no byte of it."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from gangline.trainers.checkpoint_plan import DTYPES, narrow
from gangline.trainers.commit import CheckpointInfo, CorruptCheckpointError, read_manifest
from gangline.trainers.commit_files import HEADER_DIFFERS, check_file, opened_folder, read_verified
from gangline.trainers.commit_layout import FileEntry, FileLayout, file_layouts
from gangline.trainers.commit_manifest import MANIFEST_NAME, Manifest

# A load holds the verified files in memory, so that it changes all tensors or none, up to this
# much; beyond it, files are verified once before and once more as they are used.
MAX_HELD_BYTES = 8 << 30


class SafetensorsReader(StorageReader):
    """Read a committed checkpoint; no byte is used that was not verified by this reader.

    `fetch` verifies every file that a plan needs before `read_data` changes the first tensor.
    """

    def __init__(
        self,
        path: Path,
        *,
        manifest_sha256: str | None = None,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._path = Path(path)
        self._expected_sha256 = manifest_sha256
        self._max_held_bytes = max_held_bytes
        self._manifest: Manifest | None = None
        self._layouts: dict[str, FileLayout] = {}
        self._entries: dict[MetadataIndex, FileEntry] = {}
        self._held: dict[str, bytearray] = {}
        self.info: CheckpointInfo | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._path = Path(checkpoint_id)
        self._held = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Rebuild DCP's metadata from the manifest.

        Raises: CorruptCheckpointError, also where it is not the manifest that was agreed on.
        """
        manifest, self.info = read_manifest(self._path)
        if self._expected_sha256 not in (None, "", self.info.manifest_sha256):
            reason = "is not the manifest that the ranks agreed to load"
            raise CorruptCheckpointError(self._path / MANIFEST_NAME, reason)
        self._manifest = manifest
        self._layouts = file_layouts(manifest.tensors)
        self._entries = {
            MetadataIndex(entry.name, entry.chunk.offset): entry
            for layout in self._layouts.values()
            for entry in layout.entries
        }
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[tensor.dtype]),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape))
                        for c in tensor.chunks
                    ],
                )
                for name, tensor in manifest.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        return

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def fetch(self, plan: LoadPlan) -> None:
        """Verify every file that `plan` needs, and hold as many as fit.

        Raises: CorruptCheckpointError naming the file and the reason; no tensor was touched.
        """
        manifest, num_held = self._read_manifest(), 0
        with opened_folder(self._path) as folder_fd:
            for file in self._by_file(plan):
                record, layout = manifest.files[file], self._layouts[file]
                num_held += record.num_bytes
                if num_held <= self._max_held_bytes:
                    self._held[file] = self._read_file(folder_fd, file)
                else:
                    check_file(self._path, folder_fd, file, record, header=layout.header)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of `planner`, file by file, from the bytes that were verified."""
        if not self._held:
            self.fetch(plan)
        with opened_folder(self._path) as folder_fd, torch.no_grad():
            for file, items in self._by_file(plan).items():
                data = self._held.pop(file, None) or self._read_file(folder_fd, file)
                for item in items:
                    target = planner.resolve_tensor(item)
                    source = narrow(
                        self._saved_tensor(data, item), item.storage_offsets, item.lengths
                    )
                    target.copy_(source)
                    planner.commit_tensor(item, target)
        self._held = {}
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_manifest(self) -> Manifest:
        if self._manifest is None:
            self.read_metadata()
        assert self._manifest is not None, "read_metadata sets it or raises"
        return self._manifest

    def _by_file(self, plan: LoadPlan) -> dict[str, list[ReadItem]]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._entries[item.storage_index].chunk.file].append(item)
        return dict(by_file)

    def _read_file(self, folder_fd: int, file: str) -> bytearray:
        record, layout = self._read_manifest().files[file], self._layouts[file]
        data = read_verified(self._path, folder_fd, file, record)
        if not data.startswith(layout.header):
            raise CorruptCheckpointError(self._path / file, HEADER_DIFFERS)
        return data

    def _saved_tensor(self, data: bytearray, item: ReadItem) -> torch.Tensor:
        entry = self._entries[item.storage_index]
        start = len(self._layouts[entry.chunk.file].header) + entry.start
        dtype = DTYPES[self._read_manifest().tensors[entry.name].dtype]
        count = (entry.stop - entry.start) // dtype.itemsize
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start)
        return flat.view(entry.chunk.shape)
