"""Tiny base checkpoints, as Megatron writes them: keys, shapes, chunk grid, objects and common
state.

A `Model` says what is in the checkpoint; `tensors` and `objects` are its contents, every value
different; `save` writes them through torch's own DCP writer, cut into whatever chunks are asked
for, over several files.
"""

import io
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
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

Shape = tuple[int, ...]
Cuts = list[list[int]]  # for each axis, where it is cut, both ends included
COMMON_STATE = "common_state/shard_0_1"

FC1 = "mlp.experts.experts.linear_fc1.weight"
FC2 = "mlp.experts.experts.linear_fc2.weight"
ROUTER = "mlp.router.weight"


@dataclass(frozen=True)
class Model:
    """What a base checkpoint holds.

    Attributes:
        layers, experts, hidden, ffn, vocab: sizes; no experts makes a dense model.
        dense: layers that are dense in a MoE model; their presence makes the keys per-layer, as in
            Megatron.
        stacked: whether layers are stacked.
        dtype: of the weights.
        states: optimizer states, all fp32.
    """

    layers: int = 3
    experts: int = 3
    hidden: int = 4
    ffn: int = 4
    vocab: int = 6
    dense: tuple[int, ...] = ()
    stacked: bool = True
    mtp: bool = True
    dtype: torch.dtype = torch.bfloat16
    states: tuple[str, ...] = ()

    @property
    def args(self) -> Namespace:
        return Namespace(
            num_layers=self.layers,
            encoder_num_layers=self.layers,
            num_experts=self.experts or None,
            moe_router_topk=2,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_layer_freq=1
            if self.stacked
            else [int(i not in self.dense) for i in range(self.layers)],
            hidden_size=self.hidden,
        )


# -- contents


def _attention(m: Model) -> dict[str, Shape]:
    return {
        "self_attention.linear_qkv.weight": (3 * m.hidden, m.hidden),
        "self_attention.linear_qkv.layer_norm_weight": (m.hidden,),
        "self_attention.linear_proj.weight": (m.hidden, m.hidden),
        "self_attention.linear_proj.bias": (m.hidden,),
        "self_attention.q_layernorm.weight": (2,),
        "self_attention.k_layernorm.weight": (2,),
    }


def _dense(m: Model) -> dict[str, Shape]:
    return {
        "mlp.linear_fc1.layer_norm_weight": (m.hidden,),
        "mlp.linear_fc1.weight": (2 * m.ffn, m.hidden),
        "mlp.linear_fc2.weight": (m.hidden, m.ffn),
    }


def _moe(m: Model) -> dict[str, Shape]:
    return {
        "pre_mlp_layernorm.weight": (m.hidden,),
        ROUTER: (m.experts, m.hidden),
        "mlp.router.expert_bias": (m.experts,),
        FC1: (m.experts, 2 * m.ffn, m.hidden),
        FC2: (m.experts, m.hidden, m.ffn),
        "mlp.experts.experts.linear_fc1.bias": (m.experts, 2 * m.ffn),
        "mlp.experts.experts.linear_fc2.bias": (m.experts, m.hidden),
        "mlp.shared_experts.linear_fc1.weight": (2 * m.ffn, m.hidden),
        "mlp.shared_experts.linear_fc2.weight": (m.hidden, m.ffn),
        "mlp.shared_experts.gate_weight": (1, m.hidden),
    }


def shapes(m: Model) -> dict[str, Shape]:
    """Shape of each of the model's tensors by key."""
    found: dict[str, Shape] = {
        "embedding.word_embeddings.weight": (m.vocab, m.hidden),
        "decoder.final_layernorm.weight": (m.hidden,),
        "output_layer.weight": (m.vocab, m.hidden),
    }
    if m.stacked:
        layer = _attention(m) | (_moe(m) if m.experts else _dense(m))
        found |= {f"decoder.layers.{name}": (m.layers, *shape) for name, shape in layer.items()}
    else:
        for i in range(m.layers):
            layer = _attention(m) | (_dense(m) if i in m.dense or not m.experts else _moe(m))
            found |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    if m.mtp and m.experts:
        found |= {
            f"mtp.layers.0.transformer_layer.{n}": s for n, s in (_attention(m) | _moe(m)).items()
        }
        norms = {
            f"mtp.layers.0.{name}.weight": (m.hidden,)
            for name in ("enorm", "hnorm", "final_layernorm")
        }
        found |= {"mtp.layers.0.eh_proj.weight": (m.hidden, 2 * m.hidden), **norms}
    return found


def tensors(m: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors: each (layer, expert) on a scale of its own, weights cast from
    masters."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for key, shape in shapes(m).items():
        exact = _values(shape, generator)
        is_buffer = key.endswith("expert_bias")
        found[key] = exact if is_buffer else exact.to(m.dtype)
        for state in () if is_buffer else m.states:
            fresh = exact if state in ("param", "fp32_param") else _values(shape, generator)
            found[f"optimizer.state.{state}.{key}"] = (
                fresh.square() if state == "exp_avg_sq" else fresh
            )
    return found


def _values(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    for axis in range(min(2, len(shape) - 1)):
        scale = 1 + 0.5 * torch.arange(shape[axis], dtype=torch.float32)
        values = values * scale.view(*(-1 if a == axis else 1 for a in range(len(shape))))
    return values


def objects(m: Model) -> dict[str, Any]:
    """The checkpoint's objects; each extra state names its own key, so that none can pass for
    another."""
    found: dict[str, Any] = {
        COMMON_STATE: [
            {
                "args": m.args,
                "iteration": 7,
                "checkpoint_version": 3.0,
                "optimizer": {"param_groups": [1]},
            }
        ],
        "rng_state/shard_0.0_1.1": ["rng"],
        "rerun_state_machine_state/shard_0_1": {"mode": 1},
        "output_layer._extra_state/shard_0_1": b"head",
    }
    qkv, experts = (
        "self_attention.linear_qkv._extra_state",
        "mlp.experts.experts.linear_fc1._extra_state",
    )
    keys = []
    for i in range(m.layers):
        keys.append(
            f"decoder.layers.{qkv}/shard_{i}_{m.layers}"
            if m.stacked
            else f"decoder.layers.{i}.{qkv}/shard_0_1"
        )
        for e in range(0 if i in m.dense else m.experts):
            grid = (
                f"shard_{i}.{e}_{m.layers}.{m.experts}" if m.stacked else f"shard_{e}_{m.experts}"
            )
            keys.append(
                f"decoder.layers.{experts}/{grid}"
                if m.stacked
                else f"decoder.layers.{i}.{experts}/{grid}"
            )
    if m.mtp and m.experts:
        keys += [
            f"mtp.layers.0.transformer_layer.{experts}/shard_{e}_{m.experts}"
            for e in range(m.experts)
        ]
        keys += [
            f"mtp.layers.0.transformer_layer.{qkv}/shard_0_1",
            "mtp.layers.0.eh_proj._extra_state/shard_0_1",
        ]
    return found | {key: {"of": key} for key in keys}


# -- chunk grids


def whole(key: str, shape: Shape) -> Cuts:
    """One chunk."""
    return [[0, n] for n in shape]


def megatron(tp: int = 2) -> Callable[[str, Shape], Cuts]:
    """As Megatron saves: one chunk for each (layer, expert, gate or up half, tensor-parallel
    shard)."""

    def cuts(key: str, shape: Shape) -> Cuts:
        grid = [[0, n] for n in shape]
        stacked = "decoder.layers." in key and not any(part.isdigit() for part in key.split("."))
        if stacked:
            grid[0] = list(range(shape[0] + 1))
        if "mlp.experts.experts." in key:
            grid[int(stacked)] = list(range(shape[int(stacked)] + 1))
        sharded = {
            "linear_fc1.weight": (-2, 2 * tp),
            "linear_fc1.bias": (-1, 2 * tp),
            "linear_fc2.weight": (-1, tp),
            "linear_qkv.weight": (-2, tp),
            "linear_proj.weight": (-1, tp),
            "eh_proj.weight": (-2, tp),
            "word_embeddings.weight": (-2, tp),
            "output_layer.weight": (-2, tp),
        }
        for name, (axis, parts) in sharded.items():
            if key.endswith(name):
                grid[axis] = _even(shape[axis], parts)
        return grid

    return cuts


def every(sizes: Sequence[int]) -> Callable[[str, Shape], Cuts]:
    """Chunks of at most so many along each axis, the last entry for all further axes: uneven
    remainders."""

    def cuts(key: str, shape: Shape) -> Cuts:
        steps = [sizes[min(axis, len(sizes) - 1)] for axis in range(len(shape))]
        return [[*range(0, n, step), n] for n, step in zip(shape, steps, strict=True)]

    return cuts


def _even(length: int, parts: int) -> list[int]:
    return sorted({i * length // parts for i in range(parts + 1)})


# -- writing


class _ChunkPlanner(DefaultSavePlanner):
    """Writes each tensor as the chunks of its grid, as many ranks would."""

    def __init__(self, grid: Callable[[str, Shape], Cuts]) -> None:
        super().__init__(flatten_state_dict=False)
        self._grid = grid

    def create_local_plan(self) -> SavePlan:
        items = [item for key, value in self.state_dict.items() for item in self._items(key, value)]
        self.plan = SavePlan(items)
        return self.plan

    def _items(self, key: str, value: Any) -> list[WriteItem]:
        if not isinstance(value, torch.Tensor):
            return [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)]
        items = []
        for box in product(*(list(pairwise(cuts)) for cuts in self._grid(key, tuple(value.shape)))):
            offsets, sizes = torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box)
            data = TensorWriteData(
                ChunkStorageMetadata(offsets, sizes),
                TensorProperties.create_from_tensor(value),
                value.size(),
            )
            items.append(
                WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)
            )
        return items

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        value = self.state_dict[write_item.index.fqn]
        if write_item.tensor_data is None:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            return buffer
        chunk = write_item.tensor_data.chunk
        for axis, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            value = value.narrow(axis, offset, size)
        return value.contiguous().clone()


def save(
    directory: Path,
    state: dict[str, Any],
    grid: Callable[[str, Shape], Cuts] | None = None,
    *,
    num_files: int = 3,
) -> Path:
    """Write a checkpoint of tensors and objects.

    Args:
        directory: made where missing.
        state: tensors and objects by key.
        grid: how tensors are cut; None writes as torch's own planner does, each tensor whole.
        num_files: data files that chunks are dealt over, as if from so many ranks.
    """
    writer = dcp.FileSystemWriter(directory, sync_files=False, thread_count=num_files)
    planner = DefaultSavePlanner(flatten_state_dict=False) if grid is None else _ChunkPlanner(grid)
    dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    return directory


def num_chunks(grid: Callable[[str, Shape], Cuts], key: str, shape: Shape) -> int:
    return math.prod(len(cuts) - 1 for cuts in grid(key, shape))
