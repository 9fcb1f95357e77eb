"""A base checkpoint seen through a plan: the grown checkpoint's metadata, and where each box of it
lies in the base.

Linear in the number of chunks. The base's metadata may be shared with its owner (Megatron caches
it), so this builds anew and changes nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain, product

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_growth.checkpoint.collector import collector_off
from megatron_growth.checkpoint.source import SourceCheckpoint, SourceTensor
from megatron_growth.errors import PlanError
from megatron_growth.planning.keys import Key, parse
from megatron_growth.planning.pieces import Box, Piece, Shape
from megatron_growth.planning.plan import MASTER_STATES, GrowthPlan


class ChunkIndex:
    """A source tensor's chunks by (layer, expert), so that a box's chunks are found without a scan,
    and no box is made of a chunk that nobody asks for.

    A *cell* is a place on the leading axes, layer and expert, counted in row-major order.
    """

    def __init__(self, tensor: SourceTensor) -> None:
        self._tensor = tensor
        lead = _lead_axes(tensor.key)
        self._grid = tensor.shape[:lead]
        offsets, spans = tensor.offsets[:, :lead], tensor.sizes[:, :lead]
        counts = spans.prod(axis=1) * (tensor.sizes.prod(axis=1) > 0)
        chunks = np.repeat(np.arange(len(counts)), counts)  # one entry for each cell of each chunk
        rest = np.arange(len(chunks)) - np.repeat(counts.cumsum() - counts, counts)
        cells, stride = np.zeros_like(chunks), 1
        for axis in reversed(range(lead)):
            rest, step = np.divmod(rest, spans[chunks, axis])
            cells += (offsets[chunks, axis] + step) * stride
            stride *= self._grid[axis]
        order = np.argsort(cells, kind="stable")
        self._chunks = chunks[order]
        self._starts = np.searchsorted(cells[order], np.arange(stride + 1))
        self._boxes: dict[int, Box] = {}
        self._found: dict[Box, list[Box]] = {}

    def touching(self, box: Box) -> list[Box]:
        """The chunks that overlap `box`, each once."""
        if box not in self._found:  # all clones of an expert ask the same
            found: dict[int, None] = {}
            for start, stop in self._cells(box):
                inside = self._chunks[self._starts[start] : self._starts[stop]]
                found.update(dict.fromkeys(inside.tolist()))
            self._found[box] = [c for c in map(self._box, found) if c.intersect(box)]
        return self._found[box]

    def _cells(self, box: Box) -> Iterator[tuple[int, int]]:
        """The box's cells, as ranges."""
        if not self._grid:
            yield 0, 1
            return
        *outer, inner = (
            range(box.offsets[i], box.offsets[i] + box.sizes[i]) for i in range(len(self._grid))
        )
        for place in product(*outer):
            first = sum(at * self._grid[-1] for at in place)  # at most one axis is left
            yield first + inner.start, first + inner.stop

    def _box(self, chunk: int) -> Box:
        if chunk not in self._boxes:
            offsets, sizes = self._tensor.offsets[chunk], self._tensor.sizes[chunk]
            self._boxes[chunk] = Box(tuple(offsets.tolist()), tuple(sizes.tolist()))
        return self._boxes[chunk]


class GrownView:
    """The grown checkpoint, as metadata over a base.

    Attributes:
        source: the base.
        plan: the growth.
    """

    def __init__(self, source: SourceCheckpoint, plan: GrowthPlan) -> None:
        self.source = source
        self.plan = plan
        self._indices: dict[str, ChunkIndex] = {}

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Global shape of each target tensor by key.

        Raises:
            PlanError: a target layer lacks a tensor that its stack needs.
        """
        shapes: dict[str, Shape] = {}
        layers: dict[str, int] = defaultdict(int)
        for tensor in self.source.tensors.values():
            for key, shape in self.plan.target_tensors(tensor.key, tensor.shape):
                text = str(key)
                shapes[text] = shape
                if key.is_stacked and not tensor.key.is_stacked:
                    layers[text] += 1
        for text, count in layers.items():
            if count != self.plan.source.num_layers:
                raise PlanError(
                    f"{text} is in {count} of {self.plan.source.num_layers} layers, so layers "
                    "cannot be stacked in the grown checkpoint; keep `--moe-layer-freq` a list, "
                    "as in the base"
                )
        return shapes

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Data type that the grown checkpoint stores each target tensor in."""
        return {
            str(key): tensor.metadata.properties.dtype
            for tensor in self.source.tensors.values()
            for key, _ in self.plan.target_tensors(tensor.key, tensor.shape)
        }

    @cached_property
    def objects(self) -> dict[str, str]:
        """Target object -> source object, by key."""
        return {
            str(target): text
            for text, source in self.source.objects.items()
            for target in self.plan.target_objects(source)
        }

    def metadata(self) -> Metadata:
        """DCP metadata of the grown checkpoint, made anew each time. Where its bytes lie only the
        reader knows: `storage_data` is empty.

        Each tensor is one chunk. DCP's planner compares every box that a rank wants with every
        chunk there is, which for the grown model's many chunks takes minutes, and any box can be
        resolved whatever the chunks.
        """
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for key, shape in self.shapes.items():
            size, zeros = torch.Size(shape), torch.Size((0,) * len(shape))
            entries[key] = TensorStorageMetadata(
                TensorProperties(self.dtypes[key]), size, [ChunkStorageMetadata(zeros, size)]
            )
        entries.update((key, BytesStorageMetadata()) for key in self.objects)
        return Metadata(entries, planner_data={key: (key,) for key in entries}, storage_data={})

    @collector_off()
    def chunked_metadata(self) -> Metadata:
        """The same with the chunks that the grown checkpoint has when it is written out."""
        metadata = self.metadata()
        chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
        for tensor in self.source.tensors.values():
            for _, key, box in self.target_chunks(tensor):
                chunks[key].append(
                    ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
                )
        for key in self.shapes:
            metadata.state_dict_metadata[key].chunks = chunks[key]  # type: ignore[union-attr]
        return metadata

    def target_chunks(self, tensor: SourceTensor) -> Iterator[tuple[Box, str, Box]]:
        """Walk a source tensor's chunks: each chunk, a target tensor's key, and a chunk of it.

        Each target chunk is one (layer, expert) of a source chunk, or one layer with all experts
        where the source chunk holds all of them, as a router does. Together they tile the target
        tensors.
        """
        key, plan = tensor.key, self.plan
        at, cloned = int(key.is_stacked), key.rule.expert_axis
        in_key = plan.target.key_form == "per_layer" or key.place != "decoder"
        names: dict[int | None, str] = {}
        for chunk in tensor.chunks:
            if not chunk.numel:
                continue
            layers: Iterable[int | None] = (key.layer,)
            if key.place == "decoder":
                sources = _span(chunk, 0) if at else layers
                layers = chain.from_iterable(plan.layers.targets[source] for source in sources)  # type: ignore[index]
            experts = self._experts(_span(chunk, at)) if cloned else [((), ())]
            rest = at + int(cloned)
            offsets, tail = chunk.offsets[rest:], chunk.sizes[rest:]
            one: Shape = () if in_key else (1,)
            for layer in layers:
                named = layer if in_key else None
                if named not in names:
                    names[named] = str(key.at(named))
                lead: Shape = () if in_key else (layer,)  # type: ignore[assignment]
                for first, count in experts:
                    box = Box((*lead, *first, *offsets), (*one, *count, *tail))
                    yield chunk, names[named], box

    def _experts(self, sources: range) -> list[tuple[Shape, Shape]]:
        """Offsets and sizes of target chunks on the expert axis."""
        plan = self.plan
        if len(sources) == plan.source.num_experts > 1:
            return [((0,), (plan.target.num_experts,))]
        return [((target,), (1,)) for source in sources for target in plan.experts.targets(source)]

    def resolve(self, key: str, box: Box) -> tuple[Piece, ...]:
        """The plan's answer for a box of target tensor `key`, where the base has what it names.

        The plan makes noisy weights from their masters; a weight that is fp32 itself has none and
        is its own.
        """
        pieces = self.plan.resolve(key, self.shapes[key], box)
        known = self.source.tensors
        return tuple(
            piece
            if piece.source_key in known
            else replace(piece, source_key=str(parse(piece.source_key).of(None)))
            for piece in pieces
        )

    def source_chunks(self, key: str, box: Box) -> list[Box]:
        """The chunks of source tensor `key` that overlap `box`."""
        if key not in self._indices:
            self._indices[key] = ChunkIndex(self.source.tensors[key])
        return self._indices[key].touching(box)

    def weight_of_master(self, key: str) -> str | None:
        """The model's weight that source tensor `key` is the fp32 master of, None where it is
        none."""
        return self._weights.get(key)

    @cached_property
    def _weights(self) -> dict[str, str]:
        """Master -> weight, of those that have both."""
        tensors = self.source.tensors
        masters = {text: t.key for text, t in tensors.items() if t.key.state in MASTER_STATES}
        weights = {text: str(key.of(None)) for text, key in masters.items()}
        return {text: weight for text, weight in weights.items() if weight in tensors}


def _lead_axes(key: Key) -> int:
    return int(key.is_stacked) + int(key.rule.expert_axis)


def _span(box: Box, axis: int) -> range:
    return range(box.offsets[axis], box.offsets[axis] + box.sizes[axis])
