"""A checkpoint's tensors and objects through a DCP reader, one part at a time.

A part is read as the whole chunks that touch it, and the latest chunks are kept a while: a chunk
that several parts share (a router's, of all experts) is read about once when parts are asked for in
the order they lie.
"""

import io
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from megatron_growth.checkpoint.verify.definition import Part, Place
from megatron_growth.errors import CheckpointError, GrowthError

_KEPT_BYTES = 64 << 20
_KEPT_CHUNKS = 4  # at least, of whatever size: one for each optimizer state and the weight

Spot = tuple[str, torch.Size]  # a chunk: key and offsets


class Stored:
    """A checkpoint as its reader shows it.

    Args:
        name: what to call it in messages.
        reader: set up here.
        metadata: of the reader.
        is_wanted: whether a key takes part.
    """

    def __init__(
        self,
        name: str,
        reader: StorageReader,
        metadata: Metadata,
        is_wanted: Callable[[str], bool] = lambda key: True,
    ) -> None:
        entries = {
            key: entry for key, entry in metadata.state_dict_metadata.items() if is_wanted(key)
        }
        self.name = name
        self.tensors = {
            key: e for key, e in entries.items() if isinstance(e, TensorStorageMetadata)
        }
        self.objects = frozenset(
            key for key, e in entries.items() if isinstance(e, BytesStorageMetadata)
        )
        self._reader = reader
        self._storage = metadata.storage_data or {}
        self._by_place: dict[tuple[str, int], dict[Place, list[ChunkStorageMetadata]]] = {}
        self._kept: OrderedDict[Spot, torch.Tensor] = OrderedDict()
        self._kept_bytes = 0
        reader.set_up_storage_reader(metadata, True)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)

    def position(self, part: Part) -> tuple[str, int]:
        """Where a part's first chunk lies: file and offset in it."""
        spots = [MetadataIndex(part.key, chunk.offsets) for chunk in self._chunks(part)]
        infos = [self._storage[spot] for spot in spots if spot in self._storage]
        return min(((str(info.relative_path), int(info.offset)) for info in infos), default=("", 0))

    def read(self, part: Part) -> torch.Tensor:
        """A part's values.

        Raises:
            CheckpointError: its chunks cannot be read, or do not cover it exactly once.
        """
        lead, chunks = len(part.place), self._chunks(part)
        values = torch.empty(self.tensors[part.key].size[lead:], dtype=self.dtype(part.key))
        covered = 0
        for chunk, stored in zip(chunks, self._read_chunks(part.key, chunks), strict=True):
            inside = stored[
                tuple(at - start for at, start in zip(part.place, chunk.offsets, strict=False))
            ]
            values[_slices(chunk)[lead:]] = inside
            covered += inside.numel()
        if covered != values.numel() or any(_overlap(a, b) for a, b in combinations(chunks, 2)):
            raise CheckpointError(
                f"the chunks of {part.key} in {self.name} hold {covered} of the {values.numel()} "
                f"elements at {list(part.place)}, each at most once; the checkpoint is damaged"
            )
        return values

    def read_objects(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Objects' bytes.

        Raises:
            CheckpointError: one cannot be read.
        """
        planner = _Receiver({})
        empty = torch.Size((0,))
        items = [
            ReadItem(LoadItemType.BYTE_IO, index, empty, index, empty, empty)
            for index in map(MetadataIndex, keys)
        ]
        self._read(items, planner)
        return planner.objects

    def _chunks(self, part: Part) -> Sequence[ChunkStorageMetadata]:
        """The chunks that touch a part."""
        lead = len(part.place)
        if (part.key, lead) not in self._by_place:
            index: dict[Place, list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in self.tensors[part.key].chunks:
                spans = [range(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True)]
                for place in product(*spans[:lead]) if chunk.sizes.numel() else ():
                    index[place].append(chunk)
            self._by_place[part.key, lead] = index
        return self._by_place[part.key, lead].get(part.place, ())

    def _read_chunks(self, key: str, chunks: Sequence[ChunkStorageMetadata]) -> list[torch.Tensor]:
        new = [chunk for chunk in chunks if (key, chunk.offsets) not in self._kept]
        if new:
            planner = _Receiver({key: self.dtype(key)})
            self._read([_whole(key, chunk) for chunk in new], planner)
            self._kept.update(planner.chunks)
            self._kept_bytes += sum(values.nbytes for values in planner.chunks.values())
        found = [self._kept[key, chunk.offsets] for chunk in chunks]
        while len(self._kept) > _KEPT_CHUNKS and self._kept_bytes > _KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes
        return found

    def _read(self, items: list[ReadItem], planner: "_Receiver") -> None:
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except GrowthError:
            raise
        except Exception as error:  # damaged bytes can raise anything when they are unpickled
            message = " ".join(str(error).split())
            raise CheckpointError(
                f"{items[0].storage_index.fqn} in {self.name} cannot be read "
                f"({type(error).__name__}: {message}); the checkpoint is damaged"
            ) from None


def _slices(chunk: ChunkStorageMetadata) -> tuple[slice, ...]:
    return tuple(
        slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
    )


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    axes = zip(_slices(a), _slices(b), strict=True)
    return all(one.start < other.stop and other.start < one.stop for one, other in axes)


def _whole(key: str, chunk: ChunkStorageMetadata) -> ReadItem:
    index, zeros = MetadataIndex(key, chunk.offsets), torch.Size((0,) * len(chunk.sizes))
    return ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, chunk.sizes)


class _Receiver(LoadPlanner):
    """Keeps whatever it is given."""

    def __init__(self, dtypes: dict[str, torch.dtype]) -> None:
        self._dtypes = dtypes
        self.chunks: dict[Spot, torch.Tensor] = {}
        self.objects: dict[str, bytes] = {}

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.empty(read_item.lengths, dtype=self._dtypes[read_item.storage_index.fqn])

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        assert read_item.storage_index.offset is not None
        self.chunks[read_item.storage_index.fqn, read_item.storage_index.offset] = tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.objects[read_item.storage_index.fqn] = value.getvalue()

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...
    def create_local_plan(self) -> LoadPlan: ...  # type: ignore[empty-body]
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]: ...  # type: ignore[empty-body]
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan: ...  # type: ignore[empty-body]
