"""What the data files of a grown checkpoint hold.

A *content* is the bytes of one record, a saved tensor chunk or object, and all places of the grown
checkpoint that have them: depth copies share their source's record, all clones of an expert share
one rescaled moment, all zeros of a shape are one, a noisy clone has a content of its own. Contents
whose bytes are a source record's need no computing; a link needs none of their bytes at all.

Target chunks are the source's: one (layer, expert) of a source chunk each, or one layer with all
experts where the source chunk holds all of them, as a router does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_growth.checkpoint.collector import collector_off
from megatron_growth.checkpoint.source import COMMON_OBJECT, SourceTensor
from megatron_growth.checkpoint.units import Chunk, beside, chunks_of, index_of
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.planning.keys import Key
from megatron_growth.planning.plan import Box, Copy, GrowthPlan, Piece, Shape, Zero


@dataclass(eq=False, slots=True)
class Content:
    """The bytes of one record, and the places that have them.

    Attributes:
        key: target tensor or object that it is, the first where there are several.
        box: the chunk of that tensor; None for an object.
        record: the source record whose bytes these are; None where they are computed.
        chunks: source chunks that must be read for it, its own and those beside.
        nbytes: of the values; a record is some 1 KiB longer. 0 for an object.
        targets: every place that has it.
    """

    key: str
    box: Box | None
    record: MetadataIndex | None
    chunks: list[Chunk]
    nbytes: int
    targets: list[MetadataIndex] = field(default_factory=list)


@collector_off()
def contents_of(view: GrownView) -> list[Content]:
    """Everything that the grown checkpoint holds, each (tensor chunk or object) in one content."""
    zeros: dict[tuple[Shape, torch.dtype], Content] = {}
    found = [
        content
        for tensor in view.source.tensors.values()
        for content in _tensor_contents(view, tensor, zeros)
    ]
    objects: dict[str, Content] = {}
    for target, source in view.objects.items():
        record = None if source == COMMON_OBJECT else MetadataIndex(source)
        content = objects.setdefault(source, Content(target, None, record, [], 0))
        content.targets.append(MetadataIndex(target))
    return [*found, *zeros.values(), *objects.values()]


def _tensor_contents(
    view: GrownView, tensor: SourceTensor, zeros: dict[tuple[Shape, torch.dtype], Content]
) -> Iterator[Content]:
    """The contents that a source tensor's chunks become; zeros, alike everywhere, go to `zeros`."""
    source_key = str(tensor.key)
    for chunk in tensor.chunks:
        found: dict[object, Content] = {}
        for key, box in target_chunks(view.plan, tensor, chunk):
            pieces = view.resolve(key, box)
            if all(piece.transform == Zero() for piece in pieces):
                known, same = zeros, (box.sizes, view.dtype(key))
            else:
                known = found
                same = tuple((piece.source_key, piece.source, piece.transform) for piece in pieces)
            if same not in known:
                known[same] = _content(view, source_key, chunk, key, box, pieces)
            known[same].targets.append(MetadataIndex(key, torch.Size(box.offsets)))
        yield from found.values()


def _content(
    view: GrownView, source_key: str, chunk: Box, key: str, box: Box, pieces: tuple[Piece, ...]
) -> Content:
    own = [needed for piece in pieces for needed in chunks_of(view, piece)]
    near = [needed for piece in pieces for needed in beside(view, piece)]
    chunks = list(dict.fromkeys([*own, *near]))
    verbatim = (
        len(pieces) == 1
        and pieces[0].transform == Copy()
        and (pieces[0].source_key, pieces[0].source) == (source_key, chunk)
        and len(box.sizes) == len(chunk.sizes)
    )
    record = index_of((source_key, chunk)) if verbatim else None
    return Content(key, box, record, chunks, box.numel * view.dtype(key).itemsize)


def target_chunks(plan: GrowthPlan, tensor: SourceTensor, chunk: Box) -> Iterator[tuple[str, Box]]:
    """The target chunks that a source chunk becomes: target key, and box in the target tensor."""
    key, at = tensor.key, int(tensor.key.is_stacked)
    experts: list[tuple[int, int] | None] = [None]  # offset and size on the expert axis
    rest = at
    if key.rule.expert_axis:
        rest = at + 1
        span = range(chunk.offsets[at], chunk.offsets[at] + chunk.sizes[at])
        if len(span) == plan.source.num_experts and len(span) > 1:
            experts = [(0, plan.target.num_experts)]
        else:
            experts = [(target, 1) for source in span for target in plan.experts.targets(source)]
    for (text, lead), expert in product(_layers(plan, key, chunk), experts):
        axes = [*lead, *([] if expert is None else [expert])]
        offsets = (*(offset for offset, _ in axes), *chunk.offsets[rest:])
        sizes = (*(size for _, size in axes), *chunk.sizes[rest:])
        yield text, Box(offsets, sizes)


def _layers(plan: GrowthPlan, key: Key, chunk: Box) -> list[tuple[str, list[tuple[int, int]]]]:
    """The target keys, with offset and size on the layer axis where they have one."""
    if key.place != "decoder":
        return [(str(key), [])]
    if not key.is_stacked:
        sources: range | list[int | None] = [key.layer]
    else:
        sources = range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
    targets = [target for source in sources for target in plan.layers.targets[source]]  # type: ignore[index]
    if plan.target.key_form == "stacked":
        return [(str(key.at(None)), [(target, 1)]) for target in targets]
    return [(str(key.at(target)), []) for target in targets]
