"""Memory of the fullest rank, and what a layer sends: estimates before anything runs.

*Weights, gradients and the optimizer* are counted from the tensors, each divided as Megatron
divides it. Bytes for a parameter: 2 for the weight, 2 or 4 for its gradient, and, spread over the
data-parallel ranks (the launcher always takes the distributed optimizer), 12 for fp32 master and
moments; 10 with `--use-precision-aware-optimizer`, whose master is the 16 bits that the bf16 weight
lacks; fewer with smaller moments. A test compares the sum with Megatron's own estimator
(megatron/training/theoretical_memory_usage.py), which knows only fp32 gradients and 12 bytes.

*Activations* that estimator counts for dense models alone. Here: what each layer keeps
(`activations.py`), for as many micro-batches as wait on a pipeline rank (`pipeline.py`), and the
larger of what the loss and what one layer's backward pass take on top. Of all pipeline ranks the
fullest is told: the first has most micro-batches, the last has the logits.

tests/planning/test_published_memory.py holds it against what others measured. Not in it: buffers
(NCCL's, the dispatcher's, CUDA graphs'), fragmentation, and a router out of balance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_growth.planning.activations import (
    BF16,
    Modules,
    layer_bytes,
    layer_work,
    module_bytes,
)
from megatron_growth.planning.cost import StoredTensor
from megatron_growth.planning.pipeline import Chunk, chunks_of, even_layout

if TYPE_CHECKING:
    from megatron_growth.geometry import Geometry

BUFFERS = 5 * 10**9  # NCCL, dispatcher, cuBLAS: not estimated
_ROUTED = "mlp.experts."
# Tensors that every tensor-parallel rank holds whole.
_WHOLE = (
    "layernorm", "router", "enorm", "hnorm", "_down_proj", "latent_proj", "gate_weight",
    "linear_proj.bias", "linear_fc2.bias",
)  # fmt: skip
_OPTIMIZER_STATES = 12  # on disk they are fp32
_LOGITS = 2 + 4  # bf16, and fp32 for the softmax, which its gradient overwrites
_KEPT_LOGITS = 4


@dataclass(frozen=True)
class Sharding:
    """How a model lies on its ranks, and what passes through at a time.

    Attributes:
        tensor, pipeline, virtual, context, expert, expert_tensor: parallel sizes.
        data, expert_data: ranks over which the optimizer of dense and of expert weights is spread.
        tokens: of a micro-batch, on one context-parallel rank.
        microbatches: of a step, on one data-parallel rank.
        gradient_bytes: of a main gradient.
        optimizer_bytes: of a parameter's master copy and moments.
        recomputed: module names of selective recomputation; `full` recomputes whole layers.
        layout: chunks of layers; divided evenly without.
        overlap: expert-parallel communication runs beside the next micro-batch.
    """

    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int
    data: int
    expert_data: int
    tokens: int
    microbatches: int
    gradient_bytes: int = 4
    optimizer_bytes: int = 12
    recomputed: tuple[str, ...] = ()
    layout: tuple[str, ...] | None = None
    overlap: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank.

    Attributes:
        pipeline_rank: which it is.
        weights, gradients, optimizer, activations: what they take.
    """

    pipeline_rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(model: "Geometry", tensors: Sequence[StoredTensor], sharding: Sharding) -> Memory:
    """Memory of the fullest rank."""
    return max(rank_memory(model, tensors, sharding), key=lambda rank: rank.total)


def rank_memory(
    model: "Geometry", tensors: Sequence[StoredTensor], sharding: Sharding
) -> list[Memory]:
    """Memory of a rank of each pipeline rank."""
    return [
        _memory(model, tensors, sharding, rank, chunks)
        for rank, chunks in enumerate(_ranks(model, sharding))
    ]


def all_to_all_bytes(model: "Geometry", sharding: Sharding) -> int:
    """What a rank dispatches in one MoE layer, forward, of one micro-batch; as much comes back."""
    if sharding.expert == 1:
        return 0
    tokens = sharding.tokens // sharding.tensor
    return tokens * model.moe_router_topk * (model.moe_latent_size or model.hidden_size) * BF16


def delivered_bytes(
    model: "Geometry", tensors: Sequence[StoredTensor], sharding: Sharding, *, optimizer: bool
) -> int:
    """What a checkpoint gives the rank that takes most: all its bf16 weights, and its share of the
    optimizer's fp32 master and moments.

    Args:
        model: its geometry.
        tensors: its weights.
        sharding: how they lie.
        optimizer: whether the optimizer's states are loaded.
    """
    return max(
        round(BF16 * (dense + expert) + optimizer * _stored(sharding, dense, expert))
        for dense, expert in (
            _held(model, tensors, sharding, chunks) for chunks in _ranks(model, sharding)
        )
    )


def _stored(sharding: Sharding, dense: float, expert: float) -> float:
    return _OPTIMIZER_STATES * (dense / sharding.data + expert / sharding.expert_data)


def _ranks(model: "Geometry", sharding: Sharding) -> list[tuple[Chunk, ...]]:
    """The chunks of each pipeline rank."""
    layout = sharding.layout or even_layout(
        model.num_layers, model.mtp_num_layers or 0, sharding.pipeline * sharding.virtual
    )
    return [
        chunks_of(rank, layout, sharding.pipeline, sharding.microbatches, overlap=sharding.overlap)
        for rank in range(sharding.pipeline)
    ]


def _memory(
    model: "Geometry",
    tensors: Sequence[StoredTensor],
    sharding: Sharding,
    rank: int,
    chunks: tuple[Chunk, ...],
) -> Memory:
    dense, expert = _held(model, tensors, sharding, chunks)
    held = dense + expert
    spread = dense / sharding.data + expert / sharding.expert_data
    return Memory(
        pipeline_rank=rank,
        weights=round(BF16 * held),
        gradients=round(sharding.gradient_bytes * held),
        optimizer=round(sharding.optimizer_bytes * spread),
        activations=round(_activations(model, sharding, chunks)),
    )


def _held(
    model: "Geometry",
    tensors: Sequence[StoredTensor],
    sharding: Sharding,
    chunks: tuple[Chunk, ...],
) -> tuple[float, float]:
    """Parameters on a rank: dense ones, and those of routed experts."""
    dense = expert = 0.0
    for tensor in tensors:
        if not _lies_in(model, tensor, chunks):
            continue
        if tensor.key.name.startswith(_ROUTED):
            expert += tensor.numel / (sharding.expert * sharding.expert_tensor)
        elif any(part in tensor.key.name for part in _WHOLE):
            dense += tensor.numel
        else:
            dense += tensor.numel / sharding.tensor
    return dense, expert


def _lies_in(model: "Geometry", tensor: StoredTensor, chunks: tuple[Chunk, ...]) -> bool:
    key = tensor.key
    if key.place == "decoder":
        return any(key.layer in chunk.layers for chunk in chunks)
    if key.place == "mtp":
        return any(key.layer in chunk.modules for chunk in chunks)
    if key.name.startswith("embedding."):
        # Multi-token prediction embeds its own input; a tied output layer is a copy.
        tied = not model.untie_embeddings_and_output_weights
        return any(chunk.embedding or chunk.modules or (tied and chunk.output) for chunk in chunks)
    return any(chunk.output for chunk in chunks)


def _activations(model: "Geometry", sharding: Sharding, chunks: tuple[Chunk, ...]) -> float:
    tokens = sharding.tokens / sharding.tensor  # sequence parallel
    recomputed, spread = frozenset(sharding.recomputed), sharding.expert_tensor
    kept = sum(chunk.waiting * _chunk(model, chunk, recomputed, spread) for chunk in chunks)
    work = max(
        (
            layer_work(model, layer, recomputed, spread)
            for chunk in chunks
            for layer in chunk.layers or (model.num_layers - 1,) * len(chunk.modules)
        ),
        default=0,
    )
    return tokens * kept + max(tokens * work, _loss(model, sharding, chunks))


def _chunk(model: "Geometry", chunk: Chunk, recomputed: Modules, spread: int) -> int:
    layers = sum(layer_bytes(model, layer, recomputed, spread) for layer in chunk.layers)
    return layers + len(chunk.modules) * module_bytes(model, recomputed, spread)


def _loss(model: "Geometry", sharding: Sharding, chunks: tuple[Chunk, ...]) -> float:
    """Logits of the last micro-batch; those of modules wait for their turn."""
    if not any(chunk.output for chunk in chunks):
        return 0.0
    modules = sum(len(chunk.modules) for chunk in chunks)
    logits = sharding.tokens * model.vocab_size / sharding.tensor
    return logits * (_LOGITS + _KEPT_LOGITS * modules)
