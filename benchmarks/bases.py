"""Synthetic bases for measurements: real files, keys and chunks as Megatron writes them, random
values. Made chunk by chunk, so that a base may be larger than memory."""

import io
import math
import zlib
from argparse import Namespace
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_growth.checkpoint.directory import TRACKER
from megatron_growth.checkpoint.source import COMMON_OBJECT

DISTRIBUTED = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Geometry:
    """A model's sizes.

    Attributes:
        layers, experts, hidden, ffn, vocab: sizes; SwiGLU, so that fc1 has two halves.
        states: optimizer states, fp32; the weights are bf16.
    """

    layers: int
    experts: int
    hidden: int
    ffn: int
    vocab: int
    states: tuple[str, ...] = ()

    def tensors(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shape and chunk shape of each tensor of the model by key."""
        n, e, h, f = self.layers, self.experts, self.hidden, self.ffn
        name = "decoder.layers."
        return {
            "embedding.word_embeddings.weight": ((self.vocab, h), (self.vocab, h)),
            "output_layer.weight": ((self.vocab, h), (self.vocab, h)),
            "decoder.final_layernorm.weight": ((h,), (h,)),
            name + "self_attention.linear_qkv.weight": ((n, 3 * h, h), (1, 3 * h, h)),
            name + "self_attention.linear_proj.weight": ((n, h, h), (1, h, h)),
            name + "mlp.router.weight": ((n, e, h), (1, e, h)),
            name + "mlp.experts.experts.linear_fc1.weight": ((n, e, 2 * f, h), (1, 1, f, h)),
            name + "mlp.experts.experts.linear_fc2.weight": ((n, e, h, f), (1, 1, h, f)),
        }

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape, _ in self.tensors().values())

    @property
    def args(self) -> Namespace:
        return Namespace(
            num_layers=self.layers,
            num_experts=self.experts,
            moe_router_topk=2,
            hidden_size=self.hidden,
            moe_layer_freq=1,
        )


def make(load: Path, geometry: Geometry, num_files: int = 8) -> Path:
    """Write a base, unless it is there.

    Args:
        load: becomes a Megatron checkpoint directory.
        geometry: of the model.
        num_files: data files, as of so many ranks.
    """
    if (load / TRACKER).exists():
        return load
    writer = dcp.FileSystemWriter(load / "iter_0000100", thread_count=num_files)
    state: dict[str, Any] = {COMMON_OBJECT: io.BytesIO()}
    dcp.save(state, storage_writer=writer, planner=_Planner(geometry), no_dist=True)
    (load / TRACKER).write_text("100")
    return load


class _Planner(DefaultSavePlanner):
    """Plans every chunk of the geometry, and makes its values when they are written."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(flatten_state_dict=False)
        self._geometry = geometry

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(COMMON_OBJECT), WriteItemType.BYTE_IO)]
        for key, (shape, chunk) in self._geometry.tensors().items():
            items += self._items(key, shape, chunk, torch.bfloat16)
            for state in self._geometry.states:
                items += self._items(f"optimizer.state.{state}.{key}", shape, chunk, torch.float32)
        self.plan = SavePlan(items)
        return self.plan

    def _items(
        self, key: str, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: torch.dtype
    ) -> list[WriteItem]:
        places = product(*(range(0, n, step) for n, step in zip(shape, chunk, strict=True)))
        properties = TensorProperties(dtype=dtype)
        return [
            WriteItem(
                MetadataIndex(key, place),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(place), torch.Size(chunk)),
                    properties,
                    torch.Size(shape),
                ),
            )
            for place in places
        ]

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = write_item.tensor_data
        if data is None:
            buffer = io.BytesIO()
            torch.save([{"args": self._geometry.args, "iteration": 100}], buffer)
            return buffer
        key = write_item.index.fqn
        name = key.removeprefix("optimizer.state.").split(".", 1)
        is_master = key.startswith("optimizer.state.param.")
        place = f"{name[1] if is_master else key} {list(data.chunk.offsets)}"
        generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
        values = torch.empty(data.chunk.sizes).normal_(std=0.02, generator=generator)
        if not key.startswith("optimizer.state."):
            return values.to(torch.bfloat16)
        return values.square_() if "exp_avg_sq" in name[0] else values
