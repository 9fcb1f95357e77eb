"""Loading through a storage reader: a whole checkpoint as DCP does it, or any boxes in any
order."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

Shape = tuple[int, ...]
Boxes = Sequence[tuple[str, Shape, Shape]]  # key, offsets, sizes
SENTINEL = -12345.0  # what memory holds before it is loaded


def load_all(reader: StorageReader) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor and every object that the reader's metadata names, through `dcp.load`."""
    state: dict[str, Any] = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        is_tensor = isinstance(entry, TensorStorageMetadata)
        state[key] = (
            torch.full(entry.size, SENTINEL, dtype=entry.properties.dtype)
            if is_tensor
            else io.BytesIO()
        )
    dcp.load(state, storage_reader=reader, planner=_planner(), no_dist=True)
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors, {key: value for key, value in state.items() if key not in tensors}


def _planner() -> dcp.DefaultLoadPlanner:
    return dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def load_tensors(reader: StorageReader, *keys: str) -> list[torch.Tensor]:
    entries = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.full(entries[key].size, SENTINEL, dtype=entries[key].properties.dtype)
        for key in keys
    }  # type: ignore[union-attr]
    dcp.load(state, storage_reader=reader, planner=_planner(), no_dist=True)
    return [state[key] for key in keys]


def load_boxes(reader: StorageReader, boxes: Boxes, shuffle: Any = None) -> list[torch.Tensor]:
    """Boxes of tensors, all in one call of `read_data`, as a loader with a layout of its own would
    ask.

    Args:
        reader: set up here with its own metadata.
        boxes: what to load.
        shuffle: reorders the list of read items in place.
    """
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    planner = _BoxPlanner(metadata, boxes)
    items = planner.items()
    if shuffle:
        shuffle(items)
    reader.read_data(LoadPlan(items), planner).wait()
    planner.check_complete(items)
    return planner.memory


class _BoxPlanner(LoadPlanner):
    """Memory for each box, and one read item for each saved chunk that a box overlaps."""

    def __init__(self, metadata: Metadata, boxes: Boxes) -> None:
        self.boxes, self.entries = boxes, metadata.state_dict_metadata
        self.memory = [
            torch.full(sizes, SENTINEL, dtype=self.entries[key].properties.dtype)  # type: ignore[union-attr]
            for key, _, sizes in boxes
        ]
        self.committed: Counter[ReadItem] = Counter()

    def items(self) -> list[ReadItem]:
        items = []
        for number, (key, offsets, sizes) in enumerate(self.boxes):
            for chunk in self.entries[key].chunks:  # type: ignore[union-attr]
                low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
                high = [
                    min(a + n, b + m)
                    for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
                ]
                if any(a >= b for a, b in zip(low, high, strict=True)):
                    continue
                items.append(
                    ReadItem(
                        LoadItemType.TENSOR,
                        MetadataIndex(key, index=number),  # which box
                        torch.Size(a - b for a, b in zip(low, offsets, strict=True)),
                        MetadataIndex(key, chunk.offsets),
                        torch.Size(a - b for a, b in zip(low, chunk.offsets, strict=True)),
                        torch.Size(b - a for a, b in zip(low, high, strict=True)),
                    )
                )
        return items

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert read_item.dest_index.index is not None
        tensor = self.memory[read_item.dest_index.index]
        for axis, (offset, size) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(axis, offset, size)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.committed[read_item] += 1

    def check_complete(self, items: list[ReadItem]) -> None:
        """Every item was committed once, and together they cover every box."""
        assert self.committed == Counter(items)
        for number, memory in enumerate(self.memory):
            mine = [item for item in items if item.dest_index.index == number]
            assert sum(item.lengths.numel() for item in mine) == memory.numel()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None: ...
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...
    def create_local_plan(self) -> LoadPlan: ...  # type: ignore[empty-body]
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]: ...  # type: ignore[empty-body]
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan: ...  # type: ignore[empty-body]


class RecordingReader(dcp.FileSystemReader):
    """A base reader that keeps a list of what each `read_data` call asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.calls: list[list[MetadataIndex]] = []

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        self.calls.append([item.storage_index for item in plan.items])
        return super().read_data(plan, planner)
