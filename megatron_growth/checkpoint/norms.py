"""The layer-wise weight scale of a checkpoint, streamed.

A converged model's layers have weights whose scale rises with depth (arXiv:2510.08008, figure 2).
Interposition keeps that profile; stacking breaks it where the block starts again. The scale of a
layer is the root mean square of the elements of all its weight matrices, ||W||_F / sqrt(numel),
comparable between models of any size. Norm weights and biases are left out: they are near one or
zero, whatever the layer learned.

The base's own reader goes through each file once, from front to back, and hands over one chunk at a
time, which is squared, summed and dropped. Memory is one chunk, however large the model.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from megatron_growth.checkpoint.source import SourceCheckpoint, SourceTensor
from megatron_growth.planning.keys import Key
from megatron_growth.planning.pieces import Box

# Name in its layer begins with -> the part of the layer it belongs to.
_PARTS = (
    ("self_attention.", "attention"),
    ("mlp.router.", "router"),
    ("mlp.linear_fc", "dense"),  # the MLP of a dense layer
    ("mlp.", "experts"),  # routed and shared, with their latent projections
)
PARTS = ("attention", "experts", "dense", "router")

_BLOCK = 1 << 20  # elements squared at a time, in fp64


@dataclass(frozen=True)
class LayerScale:
    """Root mean square of a layer's weights.

    Attributes:
        layer: counted from 0.
        rms: over all its weight matrices.
        parts: the same over each part of `PARTS` that the layer has.
    """

    layer: int
    rms: float
    parts: Mapping[str, float]


@dataclass
class _Sum:
    squares: float = 0.0
    count: int = 0

    def add(self, squares: float, count: int) -> None:
        self.squares += squares
        self.count += count

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.count)


def weight_scales(
    source: SourceCheckpoint,
    tensors: Mapping[str, SourceTensor],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> tuple[LayerScale, ...]:
    """The weight scale of each decoder layer.

    Args:
        source: the checkpoint to read.
        tensors: of it, by key; what is no weight matrix of a decoder layer is passed over.
        progress: called with the bytes just read; `scale_bytes` is their sum.
    """
    matrices = dict(_matrices(tensors))
    sums: dict[tuple[int, str], _Sum] = defaultdict(_Sum)

    def visit(key: str, box: Box, values: torch.Tensor) -> None:
        parsed = matrices[key].key
        for layer, part in _by_layer(parsed, box, values):
            sums[layer, _part(parsed)].add(_squares(part), part.numel())
        progress(values.nbytes)

    _stream(source, matrices, visit)
    return tuple(_layer_scale(layer, sums) for layer in sorted({layer for layer, _ in sums}))


def scale_bytes(tensors: Mapping[str, SourceTensor]) -> int:
    """Bytes that `weight_scales` reads."""
    matrices = dict(_matrices(tensors)).values()
    return sum(math.prod(t.shape) * t.metadata.properties.dtype.itemsize for t in matrices)


def _matrices(tensors: Mapping[str, SourceTensor]) -> Iterator[tuple[str, SourceTensor]]:
    for text, tensor in tensors.items():
        name, in_layer = tensor.key.name, tensor.key.place == "decoder" and tensor.key.state is None
        if in_layer and name.endswith("weight") and "norm" not in name:
            yield text, tensor


def _part(key: Key) -> str:
    return next(part for prefix, part in _PARTS if key.name.startswith(prefix))


def _by_layer(key: Key, box: Box, values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    if key.layer is not None:
        yield key.layer, values
        return
    for index in range(box.sizes[0]):
        yield box.offsets[0] + index, values[index]


def _squares(values: torch.Tensor) -> float:
    return math.fsum(
        float(block.double().square().sum()) for block in values.reshape(-1).split(_BLOCK)
    )


def _layer_scale(layer: int, sums: Mapping[tuple[int, str], _Sum]) -> LayerScale:
    parts = {part: sums[layer, part] for part in PARTS if (layer, part) in sums}
    whole = _Sum(math.fsum(s.squares for s in parts.values()), sum(s.count for s in parts.values()))
    return LayerScale(layer, whole.rms, {part: s.rms for part, s in parts.items()})


# -- streaming

Visit = Callable[[str, Box, torch.Tensor], None]


def _stream(source: SourceCheckpoint, tensors: Mapping[str, SourceTensor], visit: Visit) -> None:
    """Call `visit` with every chunk of `tensors`, in the order that they lie on storage."""
    storage = source.metadata.storage_data or {}
    indices = {
        MetadataIndex(text, torch.Size(chunk.offsets)): chunk
        for text, tensor in tensors.items()
        for chunk in tensor.chunks
        if chunk.numel
    }

    def position(index: MetadataIndex) -> tuple[str, int]:
        info = storage[index]
        return str(getattr(info, "relative_path", "")), int(getattr(info, "offset", 0))

    items = []
    for index in sorted(indices, key=position):
        sizes = torch.Size(indices[index].sizes)
        zeros = torch.Size((0,) * len(sizes))
        items.append(ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, sizes))
    source.reader.set_up_storage_reader(source.metadata, True)
    dtypes = {text: tensor.metadata.properties.dtype for text, tensor in tensors.items()}
    source.reader.read_data(LoadPlan(items), _Visitor(dtypes, visit)).wait()


class _Visitor(LoadPlanner):
    """Gives each chunk memory of its own, and lets go of it once it was seen."""

    def __init__(self, dtypes: Mapping[str, torch.dtype], visit: Visit) -> None:
        self._dtypes = dtypes
        self._visit = visit

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.empty(read_item.lengths, dtype=self._dtypes[read_item.storage_index.fqn])

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        assert read_item.storage_index.offset is not None
        box = Box(tuple(read_item.storage_index.offset), tuple(read_item.lengths))
        self._visit(read_item.storage_index.fqn, box, tensor)

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...
    def create_local_plan(self) -> LoadPlan: ...  # type: ignore[empty-body]
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]: ...  # type: ignore[empty-body]
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan: ...  # type: ignore[empty-body]
    def load_bytes(self, read_item: ReadItem, value: Any) -> None: ...
