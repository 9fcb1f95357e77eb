"""Values of the grown model, made of source chunks that are in memory.

A *part* is what one source chunk gives to a box of a target tensor: the box is resolved to pieces
(`GrowthPlan.resolve`), and each piece is cut where the source's chunks are. `Values` applies the
piece's transform. The reader and the writer both make every value here, so that they cannot differ.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_growth.checkpoint.noise import add_noise
from megatron_growth.checkpoint.sigma import standard_deviation
from megatron_growth.checkpoint.units import Chunk
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.pieces import (
    PARKING_DISTANCE,
    Box,
    Copy,
    Divide,
    Noise,
    Park,
    Piece,
    Zero,
)

_BLOCK = 1 << 20  # elements

Chunks = Mapping[Chunk, torch.Tensor]  # those in memory


@dataclass(frozen=True, eq=False)
class Part:
    """What one source chunk gives to a box of a target tensor.

    Attributes:
        piece: the plan's answer for (part of) the box.
        dtype: that the grown checkpoint stores the target in.
        chunk: the source chunk, None for zeros.
        box: the overlap of the chunk with the piece's source, in the source tensor.
    """

    piece: Piece
    dtype: torch.dtype
    chunk: Chunk | None
    box: Box

    @property
    def target(self) -> Box:
        """Where the overlap lies in the target tensor. Axes align from the right: only the layer's
        may be absent."""
        source, target = self.piece.source, self.piece.target
        if self.chunk is None:
            return target
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


def parts_of(view: GrownView, key: str, box: Box) -> Iterator[Part]:
    """The parts that tile `box` of target tensor `key`."""
    dtype = view.dtypes[key]
    for piece in view.resolve(key, box):
        if isinstance(piece.transform, Zero):
            yield Part(piece, dtype, None, piece.source)
            continue
        for chunk in view.source_chunks(piece.source_key, piece.source):
            overlap = chunk.intersect(piece.source)
            assert overlap is not None
            yield Part(piece, dtype, (piece.source_key, chunk), overlap)


class Values:
    """Makes parts' values.

    Args:
        view: the grown view.
        chunks: the source chunks in memory, a unit's at least.
    """

    def __init__(self, view: GrownView, chunks: Chunks) -> None:
        self._view = view
        self._chunks = chunks
        self._sigmas: dict[tuple[str, Box], float] = {}

    def write(self, part: Part, place: torch.Tensor) -> None:
        """Write a part's values.

        Args:
            part: which.
            place: memory for the part's target box, of the type it is stored in or any other.

        Raises:
            CheckpointError: the source is not finite where noise needs its standard deviation, or
                too wide to park clones below it.
        """
        if part.chunk is None:
            place.zero_()
            return
        transform = part.piece.transform
        values = narrow(self._chunks[part.chunk], part.chunk[1], part.box)
        place = place.view(values.shape)
        if isinstance(transform, Divide):
            for now, source in _blocks(values):
                place[now] = (source.float() / transform.by).to(part.dtype)
        elif isinstance(transform, Noise):
            self._write_noisy(values, part, transform, place)
        elif isinstance(transform, Park):
            biases = self._inside(part.piece.source_key, transform.scope)
            place.copy_(_parked(values, part, biases))
        else:
            assert isinstance(transform, Copy)
            place.copy_(values)

    def check_master(self, master: Chunk) -> None:
        """A master must round to its weight; where it does not, the moments beside it are not to be
        trusted either. Chunks that are no master's pass.

        Megatron-core 0.19.0 to 0.19.2 can save `fully_reshardable` optimizer state shifted when
        its buckets are padded.

        Raises:
            CheckpointError: it does not.
        """
        key, box = master
        weight = self._view.weight_of_master(key)
        if weight is None:
            return
        for other in self._view.source_chunks(weight, box):
            overlap = other.intersect(box)
            if overlap is None or (weight, other) not in self._chunks:
                continue
            exact = narrow(self._chunks[master], box, overlap)
            model = narrow(self._chunks[weight, other], other, overlap)
            if not torch.equal(exact.to(model.dtype), model):
                raise CheckpointError(
                    f"{key} does not round to {weight} in box {overlap.offsets} {overlap.sizes}: "
                    "the base's optimizer state is damaged (megatron-core 0.19.0 to 0.19.2 save "
                    "it shifted when buckets are padded); use `optimizer: reset`, which grows the "
                    "weights alone"
                )

    def _write_noisy(
        self, values: torch.Tensor, part: Part, noise: Noise, place: torch.Tensor
    ) -> None:
        """source + noise in fp32, rounded to the type that the grown checkpoint stores."""
        key = part.piece.source_key
        shape = self._view.source.tensors[key].shape
        scale = noise.alpha * self._sigma(key, noise.scope)
        for now, source in _blocks(values, noise.lead):
            grown = source.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            offsets = (
                offset + one.start for offset, one in zip(part.box.offsets, now, strict=False)
            )
            box = Box(tuple(offsets)[noise.lead :], tuple(source.shape[noise.lead :]))
            add_noise(grown, box=box, shape=shape[noise.lead :], stream=noise.stream, scale=scale)
            place[now] = grown.to(part.dtype)

    def _sigma(self, key: str, scope: Box) -> float:
        if (key, scope) not in self._sigmas:
            self._sigmas[key, scope] = self._measured(key, scope)
        return self._sigmas[key, scope]

    def _measured(self, key: str, scope: Box) -> float:
        sigma = standard_deviation(self._inside(key, scope))
        if not sigma < float("inf"):
            raise CheckpointError(
                f"{key} has values that are not finite in box {scope.offsets} {scope.sizes}, so "
                "its clones' noise has no scale; "
                "the base has diverged: grow an earlier iteration"
            )
        return sigma

    def _inside(self, key: str, scope: Box) -> list[torch.Tensor]:
        """What lies in a box of a source tensor, chunk by chunk."""
        return [
            narrow(self._chunks[key, chunk], chunk, overlap)
            for chunk in self._view.source_chunks(key, scope)
            if (overlap := chunk.intersect(scope))
        ]


def _blocks(
    values: torch.Tensor, first: int = 0
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """A tensor in blocks of some `_BLOCK` elements, cut along one axis, `first` or a later one.

    What is computed of a block is small enough for the memory to be used again for the next: fresh
    memory costs more than the computing.
    """
    shape = values.shape
    axis = next((a for a in range(first, len(shape)) if shape[a] > 1), max(len(shape) - 1, 0))
    if values.numel() <= _BLOCK or not shape:
        yield tuple(slice(0, size) for size in shape), values
        return
    step = max(1, _BLOCK * shape[axis] // values.numel())
    for start in range(0, shape[axis], step):
        end = min(start + step, shape[axis])
        now = tuple(slice(start, end) if a == axis else slice(0, n) for a, n in enumerate(shape))
        yield now, values[now]


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


def narrow(tensor: torch.Tensor, whole: Box, part: Box) -> torch.Tensor:
    """The view of `part` in a tensor that holds `whole`."""
    for axis, (offset, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
        tensor = tensor.narrow(axis, offset - whole.offsets[axis], size)
    return tensor
