"""From read items to bytes: each source chunk is read once and fanned out to all the target slices
it feeds.

    read items --resolve--> parts --by source chunk--> units --in file order--> batches --> chunks
    --> slices

Parts are `values.py`'s, units `units.py`'s. A *batch* is units of some 64 MiB, read in one call.
Nothing else is held: memory does not grow with the model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from megatron_growth.checkpoint.collector import collector_off
from megatron_growth.checkpoint.units import (
    Chunk,
    Unit,
    beside,
    dtype_of,
    group,
    in_file_order,
    index_of,
    nbytes_of,
    position,
)
from megatron_growth.checkpoint.values import Chunks, Part, Values, narrow, parts_of
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.pieces import Box

BATCH_BYTES = 64 << 20
_ALIGNMENT = 64


@dataclass(eq=False)
class Destination:
    """One read item: where its values go, and how many are still to come.

    Attributes:
        item: what the planner asked for.
        box: which box of the target tensor that is.
        missing: elements not yet written.
        tensor: the planner's memory for it, of the box's shape; fetched when first written to.
    """

    item: ReadItem
    box: Box
    missing: int
    tensor: torch.Tensor | None = None

    @classmethod
    def of(cls, item: ReadItem) -> "Destination":
        """An item's place is its chunk's offset in the target tensor plus its own offset in the
        chunk."""
        assert item.storage_index.offset is not None
        offsets = tuple(
            a + b for a, b in zip(item.storage_index.offset, item.storage_offsets, strict=True)
        )
        box = Box(offsets, tuple(item.lengths))
        return cls(item, box, box.numel)

    def write(self, part: Part, values: Values, planner: LoadPlanner) -> None:
        """Write a part's values, and commit the item when it is full."""
        if self.tensor is None:
            self.tensor = planner.resolve_tensor(self.item).detach()
        values.write(part, narrow(self.tensor, self.box, part.target))
        self.missing -= part.target.numel
        if self.missing == 0:
            planner.commit_tensor(self.item, self.tensor)
            self.tensor = None


def read_tensors(view: GrownView, items: Iterable[ReadItem], planner: LoadPlanner) -> None:
    """Fill the planner's tensors with the grown model's values.

    Raises:
        CheckpointError: the source has no value for some element, or values that are not finite
            where noise needs their standard deviation.
    """
    destinations = [d for d in map(Destination.of, items) if d.missing]
    with collector_off():
        units = group(_demands(view, destinations))
    memory = _Memory()
    for batch in _batches(view, units):
        chunks = _read(view, [chunk for unit in batch for chunk in unit.chunks], memory)
        values = Values(view, chunks)
        for chunk in chunks:
            values.check_master(chunk)
        for destination, part in (item for unit in batch for item in unit.items):
            destination.write(part, values, planner)
    unfilled = [d.item.dest_index.fqn for d in destinations if d.missing]
    if unfilled:
        raise CheckpointError(
            f"no source chunk fills all of {unfilled[0]}; the checkpoint is damaged"
        )


def _demands(
    view: GrownView, destinations: Iterable[Destination]
) -> Iterator[tuple[tuple[Destination, Part], list[Chunk]]]:
    """Every part of every read item, and the source chunks that it needs."""
    for destination in destinations:
        for part in parts_of(view, destination.item.storage_index.fqn, destination.box):
            own = [] if part.chunk is None else [part.chunk]
            yield (destination, part), [*own, *beside(view, part.piece)]


def _batches[Item](view: GrownView, units: list[Unit[Item]]) -> Iterator[list[Unit[Item]]]:
    """Units in the order their chunks lie on disk, some `BATCH_BYTES` at a time, at least one
    unit."""
    batch: list[Unit[Item]] = []
    size = 0
    for unit in in_file_order(view, units):
        more = sum(nbytes_of(view, chunk) for chunk in unit.chunks)
        if batch and size + more > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(unit)
        size += more
    if batch:
        yield batch


class _Memory:
    """Memory for one batch after the other: what is new each time costs as much as reading."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def of(self, nbytes: int) -> torch.Tensor:
        """So many bytes, the same ones each time where they suffice."""
        if self._bytes.numel() < nbytes:
            self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        return self._bytes


def _read(view: GrownView, chunks: list[Chunk], memory: _Memory) -> Chunks:
    """Read whole chunks through the base's own reader, into views of one buffer."""
    chunks = sorted(chunks, key=lambda chunk: position(view, chunk))
    padded = [-(-nbytes_of(view, chunk) // _ALIGNMENT) * _ALIGNMENT for chunk in chunks]
    buffer = memory.of(sum(padded))
    loaded: dict[Chunk, torch.Tensor] = {}
    requests = []
    for chunk, start in zip(chunks, accumulate(padded, initial=0), strict=False):
        box = chunk[1]
        place = buffer[start : start + nbytes_of(view, chunk)]
        loaded[chunk] = place.view(dtype_of(view, chunk)).view(box.sizes)
        index, zeros = index_of(chunk), torch.Size((0,) * len(box.sizes))
        requests.append(
            ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, torch.Size(box.sizes))
        )
    view.source.reader.read_data(LoadPlan(requests), _ChunkPlanner(loaded)).wait()
    return loaded


class _ChunkPlanner(LoadPlanner):
    """Receives whole source chunks."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        offset = read_item.storage_index.offset
        assert offset is not None
        return self._chunks[
            read_item.storage_index.fqn, Box(tuple(offset), tuple(read_item.lengths))
        ]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...
    def create_local_plan(self) -> LoadPlan: ...  # type: ignore[empty-body]
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]: ...  # type: ignore[empty-body]
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan: ...  # type: ignore[empty-body]
    def load_bytes(self, read_item: ReadItem, value: Any) -> None: ...
