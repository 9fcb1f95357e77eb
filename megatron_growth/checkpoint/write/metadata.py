"""The `.metadata` of a written checkpoint: for each chunk and object, which bytes of which file.

Linear in the number of chunks; pickling is most of its time.
"""

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_growth.checkpoint.collector import collector_off
from megatron_growth.checkpoint.durable import write_safely
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.checkpoint.write.contents import Content
from megatron_growth.checkpoint.write.data_files import DataFile, FileIndex
from megatron_growth.checkpoint.write.placing import placed_name


class MetadataBuilder:
    """Collects where the contents of a grown checkpoint lie.

    Args:
        view: the grown view.
    """

    def __init__(self, view: GrownView) -> None:
        self._view = view
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    @collector_off()
    def add_placed(self, contents: Iterable[Content]) -> None:
        """Contents that are records of the base's own files, which are in the checkpoint."""
        storage = self._view.source.metadata.storage_data
        for content in contents:
            info = storage[content.record]
            place = _StorageInfo(placed_name(info.relative_path), info.offset, info.length)
            for target in content.targets:
                self._add(content, target, place)

    @collector_off()
    def add_written(self, file: DataFile, index: FileIndex, *, apart: bool) -> None:
        """Contents of a data file that was written."""
        contents = [content for unit in file.units for content in unit.items]
        for content, (offset, length) in zip(contents, index.records, strict=True):
            shared = _StorageInfo(file.name, offset, length)
            for copy, target in enumerate(content.targets):
                own = _StorageInfo(file.name, offset + copy * length, length) if apart else shared
                self._add(content, target, own)

    def _add(self, content: Content, target: MetadataIndex, place: _StorageInfo) -> None:
        self._storage[target] = place
        if content.box is None:
            self._entries[target.fqn] = BytesStorageMetadata()
            return
        entry = self._entries.get(target.fqn)
        if entry is None:
            # Without strides: they describe the base's shape.
            entry = self._entries[target.fqn] = TensorStorageMetadata(
                TensorProperties(dtype=self._view.dtypes[target.fqn]),
                torch.Size(self._view.shapes[target.fqn]),
                [],
            )
        offset = target.offset
        assert isinstance(entry, TensorStorageMetadata)
        assert offset is not None
        entry.chunks.append(ChunkStorageMetadata(offset, torch.Size(content.box.sizes)))

    @collector_off()
    def write(self, directory: Path) -> None:
        """Write `.metadata`."""
        metadata = Metadata(
            state_dict_metadata=self._entries,
            planner_data={key: (key,) for key in self._entries},
            storage_data=self._storage,
        )
        write_safely(directory / ".metadata", pickle.dumps(metadata))
