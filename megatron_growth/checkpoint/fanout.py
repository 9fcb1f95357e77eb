"""From read items to bytes: each source chunk is read once and fanned out to all the target slices
it feeds.

    read items --resolve--> parts --by source chunk--> units --in file order--> batches --> chunks
    --> slices

A *part* is what one source chunk gives to one read item. A *unit* is what must be in memory
together: one source chunk, or all chunks of the tensor over which a clone's sigma is taken (one
expert's projection, one layer's router) or below which it is parked (one layer's biases), and with
a master its weight, which it must round to.
A *batch* is units of some 64 MiB, read in one call. Nothing else is held: memory does not grow with
the model.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from megatron_growth.checkpoint.noise import add_noise
from megatron_growth.checkpoint.sigma import standard_deviation
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.plan import (
    PARKING_DISTANCE,
    Box,
    Copy,
    Divide,
    Noise,
    Park,
    Piece,
    Zero,
)

BATCH_BYTES = 64 << 20
_ALIGNMENT = 64

Chunk = tuple[str, Box]  # source key, and which of its chunks
Chunks = dict[Chunk, torch.Tensor]  # those in memory


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

    def write(self, box: Box, values: torch.Tensor | None, planner: LoadPlanner) -> None:
        """Write `values` (None: zeros) to `box` of the target tensor, and commit the item when it
        is full."""
        if self.tensor is None:
            self.tensor = planner.resolve_tensor(self.item).detach()
        place = _narrow(self.tensor, self.box, box)
        if values is None:
            place.zero_()
        else:
            place.copy_(values.view(place.shape))
        self.missing -= box.numel
        if self.missing == 0:
            planner.commit_tensor(self.item, self.tensor)
            self.tensor = None


@dataclass(frozen=True, eq=False)
class Part:
    """What one source chunk gives to one read item.

    Attributes:
        destination: the read item.
        piece: the plan's answer for (part of) it.
        dtype: that the grown checkpoint stores the target in.
        chunk: the source chunk.
        box: the overlap of the chunk with the piece's source, in the source tensor.
    """

    destination: Destination
    piece: Piece
    dtype: torch.dtype
    chunk: Chunk
    box: Box

    @property
    def target(self) -> Box:
        """Where the overlap lies in the target tensor. Axes align from the right: only the layer's
        may be absent."""
        source, target = self.piece.source, self.piece.target
        axes = min(len(source.sizes), len(target.sizes))
        moved = zip(
            target.offsets[-axes:], self.box.offsets[-axes:], source.offsets[-axes:], strict=True
        )
        offsets = tuple(to + at - start for to, at, start in moved) if axes else ()
        lead = len(target.sizes) - axes
        return Box(
            (*target.offsets[:lead], *offsets),
            (*target.sizes[:lead], *(self.box.sizes[-axes:] if axes else ())),
        )


@dataclass(eq=False)
class Unit:
    """Chunks that must be in memory together, and the parts they serve."""

    chunks: list[Chunk] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


def read_tensors(view: GrownView, items: Iterable[ReadItem], planner: LoadPlanner) -> None:
    """Fill the planner's tensors with the grown model's values.

    Raises:
        CheckpointError: the source has no value for some element, or values that are not finite
            where noise needs their standard deviation.
    """
    destinations = [d for d in map(Destination.of, items) if d.missing]
    units = _group(view, _parts(view, destinations, planner))
    for batch in _batches(view, units):
        chunks = _read(view, [chunk for unit in batch for chunk in unit.chunks])
        for unit in batch:
            _serve(view, unit, chunks, planner)
    unfilled = [d.item.dest_index.fqn for d in destinations if d.missing]
    if unfilled:
        raise CheckpointError(
            f"no source chunk fills all of {unfilled[0]}; the checkpoint is damaged"
        )


# -- what is needed
# ------------------------------------------------------------------------------------------


def _parts(
    view: GrownView, destinations: Iterable[Destination], planner: LoadPlanner
) -> list[Part]:
    """Every part of every read item. Zeros need no source and are written at once."""
    parts = []
    for destination in destinations:
        key = destination.item.storage_index.fqn
        dtype = view.dtype(key)
        for piece in view.resolve(key, destination.box):
            if isinstance(piece.transform, Zero):
                destination.write(piece.target, None, planner)
                continue
            for chunk in view.source_chunks(piece.source_key, piece.source):
                overlap = chunk.intersect(piece.source)
                assert overlap is not None
                parts.append(Part(destination, piece, dtype, (piece.source_key, chunk), overlap))
    return parts


def _group(view: GrownView, parts: list[Part]) -> list[Unit]:
    """Parts by chunk, chunks joined where a sigma, a parking place or a check spans several of them
    (union-find)."""
    leader: dict[Chunk, Chunk] = {}

    def find(chunk: Chunk) -> Chunk:
        leader.setdefault(chunk, chunk)
        while leader[chunk] != chunk:
            leader[chunk] = leader[leader[chunk]]
            chunk = leader[chunk]
        return chunk

    for part in parts:
        key, transform = part.piece.source_key, part.piece.transform
        joined = (
            [(key, c) for c in view.source_chunks(key, transform.scope)]
            if isinstance(transform, Noise | Park)
            else []
        )
        if weight := view.weight_of_master(key):
            joined += [(weight, c) for c in view.source_chunks(weight, part.chunk[1])]
        root = find(part.chunk)
        for other in joined:
            leader[find(other)] = root
    units: dict[Chunk, Unit] = defaultdict(Unit)
    for chunk in leader:
        units[find(chunk)].chunks.append(chunk)
    for part in parts:
        units[find(part.chunk)].parts.append(part)
    return list(units.values())


# -- reading
# -------------------------------------------------------------------------------------------------


def _batches(view: GrownView, units: list[Unit]) -> Iterator[list[Unit]]:
    """Units in the order their chunks lie on disk, some `BATCH_BYTES` at a time, at least one
    unit."""
    units.sort(key=lambda unit: min(_position(view, chunk) for chunk in unit.chunks))
    batch: list[Unit] = []
    size = 0
    for unit in units:
        more = sum(_nbytes(view, chunk) for chunk in unit.chunks)
        if batch and size + more > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(unit)
        size += more
    if batch:
        yield batch


def _read(view: GrownView, chunks: list[Chunk]) -> Chunks:
    """Read whole chunks through the base's own reader, into views of one buffer."""
    chunks = sorted(chunks, key=lambda chunk: _position(view, chunk))
    padded = [-(-_nbytes(view, chunk) // _ALIGNMENT) * _ALIGNMENT for chunk in chunks]
    buffer = torch.empty(sum(padded), dtype=torch.uint8)
    loaded: Chunks = {}
    requests = []
    for chunk, start in zip(chunks, accumulate(padded, initial=0), strict=False):
        key, box = chunk
        dtype = view.source.tensors[key].metadata.properties.dtype
        loaded[chunk] = buffer[start : start + _nbytes(view, chunk)].view(dtype).view(box.sizes)
        index, zeros = _index(chunk), torch.Size((0,) * len(box.sizes))
        requests.append(
            ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, torch.Size(box.sizes))
        )
    view.source.reader.read_data(LoadPlan(requests), _ChunkPlanner(loaded)).wait()
    return loaded


def _index(chunk: Chunk) -> MetadataIndex:
    return MetadataIndex(chunk[0], torch.Size(chunk[1].offsets))


def _position(view: GrownView, chunk: Chunk) -> tuple[str, int]:
    """Where a chunk lies, so that each file is read from front to back."""
    info = view.source.metadata.storage_data[_index(chunk)]
    return str(getattr(info, "relative_path", "")), int(getattr(info, "offset", 0))


def _nbytes(view: GrownView, chunk: Chunk) -> int:
    return chunk[1].numel * view.source.tensors[chunk[0]].metadata.properties.dtype.itemsize


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


# -- writing to the target
# -----------------------------------------------------------------------------------


def _serve(view: GrownView, unit: Unit, chunks: Chunks, planner: LoadPlanner) -> None:
    _check_masters(view, unit, chunks)
    sigmas: dict[tuple[str, Box], float] = {}
    for part in unit.parts:
        key, piece = part.piece.source_key, part.piece
        values = _narrow(chunks[part.chunk], part.chunk[1], part.box)
        if isinstance(piece.transform, Divide):
            values = (values.float() / piece.transform.by).to(part.dtype)
        elif isinstance(piece.transform, Noise):
            scope = (key, piece.transform.scope)
            if scope not in sigmas:
                sigmas[scope] = _sigma(view, scope, chunks)
            values = _noisy(
                values, part, piece.transform, sigmas[scope], view.source.tensors[key].shape
            )
        elif isinstance(piece.transform, Park):
            values = _parked(values, part, _inside(view, (key, piece.transform.scope), chunks))
        else:
            assert isinstance(piece.transform, Copy)
        part.destination.write(part.target, values, planner)


def _check_masters(view: GrownView, unit: Unit, chunks: Chunks) -> None:
    """A master must round to its weight; where it does not, the moments beside it are not to be
    trusted either.

    Megatron-core 0.19.0 to 0.19.2 can save `fully_reshardable` optimizer state shifted when its
    buckets are padded.
    """
    for key, box in unit.chunks:
        weight = view.weight_of_master(key)
        if weight is None:
            continue
        for other in view.source_chunks(weight, box):
            overlap = other.intersect(box)
            if overlap is None or (weight, other) not in chunks:
                continue
            master = _narrow(chunks[key, box], box, overlap)
            model = _narrow(chunks[weight, other], other, overlap)
            if not torch.equal(master.to(model.dtype), model):
                raise CheckpointError(
                    f"{key} does not round to {weight} in box {overlap.offsets} {overlap.sizes}: "
                    "the base's optimizer state is damaged (megatron-core 0.19.0 to 0.19.2 save "
                    "it shifted when buckets are padded); use `optimizer: reset`, which grows the "
                    "weights alone"
                )


def _sigma(view: GrownView, scope: tuple[str, Box], chunks: Chunks) -> float:
    key, box = scope
    sigma = standard_deviation(_inside(view, scope, chunks))
    if not sigma < float("inf"):
        raise CheckpointError(
            f"{key} has values that are not finite in box {box.offsets} {box.sizes}, so its "
            "clones' noise has no scale; "
            "the base has diverged: grow an earlier iteration"
        )
    return sigma


def _inside(view: GrownView, scope: tuple[str, Box], chunks: Chunks) -> list[torch.Tensor]:
    """What lies in a box of a source tensor, chunk by chunk."""
    key, box = scope
    return [
        _narrow(chunks[key, chunk], chunk, overlap)
        for chunk in view.source_chunks(key, box)
        if (overlap := chunk.intersect(box))
    ]


def _parked(values: torch.Tensor, part: Part, biases: list[torch.Tensor]) -> torch.Tensor:
    """Selection biases of clones, below those of all originals by more than scores differ."""
    row = torch.cat([chunk.reshape(-1) for chunk in biases]).double()
    lowest, highest = float(row.min()), float(row.max())
    parked = ((values.double() - (highest - lowest)) - PARKING_DISTANCE).to(part.dtype)
    if not (highest < float("inf") and bool((parked.double() + 1 < lowest).all())):
        raise CheckpointError(
            f"{part.piece.source_key} reaches from {lowest:g} to {highest:g}, where {part.dtype} "
            "cannot place clones below every original; use `clones: active` or grow an earlier "
            "iteration"
        )
    return parked


def _noisy(
    values: torch.Tensor, part: Part, noise: Noise, sigma: float, shape: tuple[int, ...]
) -> torch.Tensor:
    """source + noise in fp32, rounded to the type that the grown checkpoint stores."""
    grown = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    inner = Box(part.box.offsets[noise.lead :], part.box.sizes[noise.lead :])
    add_noise(
        grown, box=inner, shape=shape[noise.lead :], stream=noise.stream, scale=noise.alpha * sigma
    )
    return grown.to(part.dtype)


def _narrow(tensor: torch.Tensor, whole: Box, part: Box) -> torch.Tensor:
    """The view of `part` in a tensor that holds `whole`."""
    for axis, (offset, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
        tensor = tensor.narrow(axis, offset - whole.offsets[axis], size)
    return tensor
