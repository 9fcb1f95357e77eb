"""A base checkpoint seen through a plan: the grown checkpoint's metadata, and where each box of it
lies in the base.

Linear in the number of chunks. The base's metadata may be shared with its owner (Megatron caches
it), so this builds anew and changes nothing.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

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
from megatron_growth.planning.plan import MASTER_STATES, Box, GrowthPlan, Piece, Shape


@dataclass(frozen=True)
class ChunkIndex:
    """A source tensor's chunks by (layer, expert), so that a box's chunks are found without a scan.

    Attributes:
        lead: leading axes, layer and expert, that the index goes by.
        cells: chunks that touch each place on those axes.
    """

    lead: int
    cells: dict[Shape, list[Box]]

    @classmethod
    def of(cls, tensor: SourceTensor) -> "ChunkIndex":
        lead = _lead_axes(tensor.key)
        cells: dict[Shape, list[Box]] = defaultdict(list)
        for chunk in tensor.chunks:
            for place in product(
                *(range(chunk.offsets[i], chunk.offsets[i] + chunk.sizes[i]) for i in range(lead))
            ):
                cells[place].append(chunk)
        return cls(lead, cells)

    def touching(self, box: Box) -> list[Box]:
        """The chunks that overlap `box`, each once."""
        places = product(
            *(range(box.offsets[i], box.offsets[i] + box.sizes[i]) for i in range(self.lead))
        )
        chunks = {chunk: None for place in places for chunk in self.cells.get(place, ())}
        return [chunk for chunk in chunks if chunk.intersect(box)]


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
    def objects(self) -> dict[str, str]:
        """Target object -> source object, by key."""
        return {
            str(target): text
            for text, source in self.source.objects.items()
            for target in self.plan.target_objects(source)
        }

    @cached_property
    @collector_off()
    def metadata(self) -> Metadata:
        """DCP metadata of the grown checkpoint. Where its bytes lie only the reader knows:
        `storage_data` is empty."""
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for tensor in self.source.tensors.values():
            grown = _grown_chunks(tensor, self.plan)
            for key, shape in self.plan.target_tensors(tensor.key, tensor.shape):
                text = str(key)
                if text not in entries:
                    entries[text] = TensorStorageMetadata(
                        _properties(tensor), torch.Size(shape), []
                    )
                entries[text].chunks.extend(grown[key.layer])  # type: ignore[union-attr]
        entries.update({text: BytesStorageMetadata() for text in self.objects})
        return Metadata(
            state_dict_metadata=entries,
            planner_data={text: (text,) for text in entries},
            storage_data={},
        )

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
            self._indices[key] = ChunkIndex.of(self.source.tensors[key])
        return self._indices[key].touching(box)

    def weight_of_master(self, key: str) -> str | None:
        """The model's weight that source tensor `key` is the fp32 master of, None where it is
        none."""
        parsed = self.source.tensors[key].key
        weight = str(parsed.of(None))
        return weight if parsed.state in MASTER_STATES and weight in self.source.tensors else None

    def dtype(self, key: str) -> torch.dtype:
        """Data type that the grown checkpoint stores target tensor `key` in."""
        return self.metadata.state_dict_metadata[key].properties.dtype  # type: ignore[union-attr]


def _lead_axes(key: Key) -> int:
    return int(key.is_stacked) + int(key.rule.expert_axis)


def _grown_chunks(
    tensor: SourceTensor, plan: GrowthPlan
) -> dict[int | None, list[ChunkStorageMetadata]]:
    """Chunks of the target tensors that `tensor` becomes, by the layer in the target's key (None:
    in no key).

    Each target chunk is one (layer, expert): it aliases the same part of one source chunk.
    """
    key = tensor.key
    grown: dict[int | None, list[ChunkStorageMetadata]] = defaultdict(list)
    in_key = key.place == "decoder" and plan.target.key_form == "per_layer"
    for chunk in tensor.chunks:
        at = int(key.is_stacked)
        layers: list[int | None] = [key.layer]
        if key.place == "decoder":
            found = (
                range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) if at else [key.layer]
            )
            layers = [target for source in found for target in plan.layers.targets[source]]  # type: ignore[index]
        experts: list[int | None] = [None]
        if key.rule.expert_axis:
            span = range(chunk.offsets[at], chunk.offsets[at] + chunk.sizes[at])
            experts = [target for source in span for target in plan.experts.targets(source)]
            at += 1
        for layer, expert in product(layers, experts):
            lead = [layer] if key.place == "decoder" and not in_key else []
            lead += [] if expert is None else [expert]
            offsets = torch.Size((*lead, *chunk.offsets[at:]))  # type: ignore[arg-type]
            sizes = torch.Size((*(1 for _ in lead), *chunk.sizes[at:]))
            named = layer if in_key or key.place != "decoder" else None
            grown[named].append(ChunkStorageMetadata(offsets, sizes))
    return grown


def _properties(tensor: SourceTensor) -> TensorProperties:
    """Without strides: they describe the base's shape."""
    return TensorProperties(dtype=tensor.metadata.properties.dtype)
