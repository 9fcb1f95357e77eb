"""What the data files of a grown checkpoint hold.

A *content* is the bytes of one record, a saved tensor chunk or object, and all places of the grown
checkpoint that have them: depth copies share their source's record, all clones of an expert share
one rescaled moment, all zeros of a shape are one, a noisy clone has a content of its own. Contents
whose bytes are a source record's need no computing; a link needs none of their bytes at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_growth.checkpoint.collector import collector_off
from megatron_growth.checkpoint.source import COMMON_OBJECT, SourceTensor
from megatron_growth.checkpoint.units import Chunk, beside, chunks_of, index_of
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.planning.pieces import Box, Copy, Piece, Shape, Zero


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
def contents_of(view: GrownView, *, placed: bool) -> list[Content]:
    """Everything that the grown checkpoint holds, each (tensor chunk or object) in one content.

    Args:
        view: the grown view.
        placed: records of the base stay where they are, so that no chunk is read for them.
    """
    zeros: dict[object, Content] = {}
    found = [
        content
        for tensor in view.source.tensors.values()
        for content in _tensor_contents(view, tensor, zeros, placed)
    ]
    objects: dict[str, Content] = {}
    for target, source in view.objects.items():
        record = None if source == COMMON_OBJECT else MetadataIndex(source)
        content = objects.setdefault(source, Content(target, None, record, [], 0))
        content.targets.append(MetadataIndex(target))
    return [*found, *zeros.values(), *objects.values()]


def _tensor_contents(
    view: GrownView,
    tensor: SourceTensor,
    zeros: dict[object, Content],
    placed: bool,
) -> Iterator[Content]:
    """The contents that a source tensor's chunks become; zeros, alike everywhere, go to `zeros`."""
    source_key = str(tensor.key)
    for chunk, places in groupby(view.target_chunks(tensor), key=itemgetter(0)):
        found: dict[object, Content] = {}
        for _, key, box in places:
            pieces = view.resolve(key, box)
            same: object = tuple((p.source_key, p.source, p.transform) for p in pieces)
            known = found
            if all(piece.transform == Zero() for piece in pieces):
                known, same = zeros, (box.sizes, view.dtypes[key])
            if same not in known:
                record = (
                    index_of((source_key, chunk))
                    if _is_whole(pieces, source_key, chunk, box)
                    else None
                )
                chunks = [] if record and placed else _chunks(view, pieces)
                nbytes = box.numel * view.dtypes[key].itemsize
                known[same] = Content(key, box, record, chunks, nbytes)
            known[same].targets.append(MetadataIndex(key, torch.Size(box.offsets)))
        yield from found.values()


def _chunks(view: GrownView, pieces: tuple[Piece, ...]) -> list[Chunk]:
    own = [needed for piece in pieces for needed in chunks_of(view, piece)]
    near = [needed for piece in pieces for needed in beside(view, piece)]
    return list(dict.fromkeys([*own, *near]))


def _is_whole(pieces: tuple[Piece, ...], source_key: str, chunk: Box, box: Box) -> bool:
    """Whether the pieces of a target chunk are a source chunk as it is."""
    if box.sizes != chunk.sizes:
        return False
    return all(
        piece.transform == Copy()
        and piece.source_key == source_key
        and piece.source.sizes == piece.target.sizes
        and _inside(piece.source, chunk) == _inside(piece.target, box)
        for piece in pieces
    )


def _inside(part: Box, whole: Box) -> Shape:
    return tuple(a - b for a, b in zip(part.offsets, whole.offsets, strict=True))
