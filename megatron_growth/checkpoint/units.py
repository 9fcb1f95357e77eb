"""Source chunks, and which of them must be in memory together.

A *unit* is one source chunk, or all chunks of the tensor over which a clone's sigma is taken (one
expert's projection, one layer's router) or below which it is parked (one layer's biases), and with
a master its weight, which it must round to.
Whoever makes grown values, the reader at load or the writer offline, goes through the source unit
by unit: each chunk is read once, and memory does not grow with the model.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_growth.checkpoint.view import GrownView
from megatron_growth.planning.pieces import Box, Noise, Park, Piece, Zero

Chunk = tuple[str, Box]  # source key, and which of its chunks


@dataclass(eq=False)
class Unit[Item]:
    """Chunks that must be in memory together, and what is made of them."""

    chunks: list[Chunk] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


def chunks_of(view: GrownView, piece: Piece) -> list[Chunk]:
    """The source chunks that hold a piece's source; none for zeros."""
    if isinstance(piece.transform, Zero):
        return []
    key = piece.source_key
    return [(key, chunk) for chunk in view.source_chunks(key, piece.source)]


def beside(view: GrownView, piece: Piece) -> Iterator[Chunk]:
    """The source chunks that must be in memory beside a piece's own: for its sigma or parking
    place, for the check of its master."""
    if isinstance(piece.transform, Zero):
        return
    key = piece.source_key
    if isinstance(piece.transform, Noise | Park):
        yield from ((key, chunk) for chunk in view.source_chunks(key, piece.transform.scope))
    if weight := view.weight_of_master(key):
        for chunk in view.source_chunks(key, piece.source):
            yield from ((weight, other) for other in view.source_chunks(weight, chunk))


def group[Item](demands: Iterable[tuple[Item, list[Chunk]]]) -> list[Unit[Item]]:
    """Items with the chunks that each needs, as units (union-find); items that need none make one
    unit of their own."""
    leader: dict[Chunk, Chunk] = {}
    homes: list[tuple[Item, Chunk | None]] = []

    def find(chunk: Chunk) -> Chunk:
        leader.setdefault(chunk, chunk)
        while leader[chunk] != chunk:
            leader[chunk] = leader[leader[chunk]]
            chunk = leader[chunk]
        return chunk

    for item, chunks in demands:
        homes.append((item, chunks[0] if chunks else None))
        root = find(chunks[0]) if chunks else None
        for other in chunks[1:]:
            leader[find(other)] = root  # type: ignore[assignment]
    units: dict[Chunk | None, Unit[Item]] = defaultdict(Unit)
    for chunk in leader:
        units[find(chunk)].chunks.append(chunk)
    for item, home in homes:
        units[None if home is None else find(home)].items.append(item)
    return list(units.values())


def in_file_order[Item](view: GrownView, units: Iterable[Unit[Item]]) -> list[Unit[Item]]:
    """Units as their chunks lie on storage, so that each file is read from front to back."""
    nowhere = ("", -1)
    return sorted(
        units,
        key=lambda unit: min((position(view, chunk) for chunk in unit.chunks), default=nowhere),
    )


def index_of(chunk: Chunk) -> MetadataIndex:
    """What DCP's storage metadata calls a chunk."""
    return MetadataIndex(chunk[0], torch.Size(chunk[1].offsets))


def position(view: GrownView, chunk: Chunk) -> tuple[str, int]:
    """Where a chunk lies: file, and offset in it."""
    info = view.source.metadata.storage_data[index_of(chunk)]
    return str(getattr(info, "relative_path", "")), int(getattr(info, "offset", 0))


def dtype_of(view: GrownView, chunk: Chunk) -> torch.dtype:
    return view.source.tensors[chunk[0]].metadata.properties.dtype


def nbytes_of(view: GrownView, chunk: Chunk) -> int:
    return chunk[1].numel * dtype_of(view, chunk).itemsize
