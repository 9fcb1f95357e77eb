"""Memory of the fullest rank, and what a layer sends: estimates before anything runs.

*Weights, gradients and the optimizer* are counted from the tensors, each divided as Megatron
divides it: 2 bytes a weight, 2 or 4 a gradient, 12 (fp32 master, both moments) spread over the
data-parallel ranks. A test compares the sum with Megatron's own estimator
(megatron/training/theoretical_memory_usage.py), which knows only fp32 gradients.

*Activations* that estimator counts for dense models alone. Here they are summed for bf16 with flash
attention and dropless, balanced experts; what a backward pass keeps for one token and layer:

    2 norms' inputs, 2 norms' outputs      4 x 2 hidden        `layernorm` recomputed: outputs free
    queries, keys, values; their result    2 (heads + 2 groups) head + 2 heads head
    top-k times: dispatched, combined      2 x 2 hidden        `moe` recomputed: all of these free
                 fc1's output, activation  2 x 2 ffn + 2 ffn   `moe_act` recomputed: the latter free

One published peak is known to us, Qwen3-30B-A3B on 16 H100 (TP1 PP1 EP16, 62.17 GiB,
Megatron-Bridge); the sum is 62.4 GiB. Expect 15 %, and 5 GB for NCCL's and the dispatcher's buffers
on top; a router out of balance is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_growth.planning.cost import StoredTensor

if TYPE_CHECKING:
    from megatron_growth.geometry import Geometry

BUFFERS = 5 * 10**9  # NCCL, dispatcher, cuBLAS: not estimated
_WEIGHT = 2
_OPTIMIZER = 12
_ROUTED = "mlp.experts."
# Tensors that every tensor-parallel rank holds whole.
_WHOLE = ("layernorm", "router", "enorm", "hnorm", "_down_proj")


@dataclass(frozen=True)
class Sharding:
    """How a model lies on its ranks, and what passes through at a time.

    Attributes:
        tensor, pipeline, virtual, context, expert, expert_tensor: parallel sizes.
        data, expert_data: replicas of dense and of expert weights.
        tokens: of a micro-batch, on one context-parallel rank.
        microbatches: of a step, on one data-parallel rank.
        gradient_bytes: of a main gradient.
        recomputed: module names of selective recomputation; `full` recomputes whole layers.
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
    recomputed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(model: "Geometry", tensors: Sequence[StoredTensor], sharding: Sharding) -> Memory:
    """Memory of the first pipeline stage's ranks, where most micro-batches are in flight."""
    dense, expert = _held(tensors, sharding)
    held = dense + expert
    return Memory(
        weights=round(_WEIGHT * held),
        gradients=round(sharding.gradient_bytes * held),
        optimizer=round(_OPTIMIZER * (dense / sharding.data + expert / sharding.expert_data)),
        activations=round(_activations(model, sharding)),
    )


def all_to_all_bytes(model: "Geometry", sharding: Sharding) -> int:
    """What a rank dispatches in one MoE layer, forward, of one micro-batch; as much comes back."""
    if sharding.expert == 1:
        return 0
    tokens = sharding.tokens // sharding.tensor
    return tokens * model.moe_router_topk * model.hidden_size * _WEIGHT


def _held(tensors: Sequence[StoredTensor], sharding: Sharding) -> tuple[float, float]:
    """Parameters on a rank of the first stage: dense ones, and those of routed experts."""
    dense = expert = 0.0
    for tensor in tensors:
        share = float(tensor.numel)
        if tensor.key.place == "decoder":
            share /= sharding.pipeline
        elif sharding.pipeline > 1 and not tensor.key.name.startswith("embedding."):
            continue  # on the last stage
        if tensor.key.name.startswith(_ROUTED):
            expert += share / (sharding.expert * sharding.expert_tensor)
        elif any(part in tensor.key.name for part in _WHOLE):
            dense += share
        else:
            dense += share / sharding.tensor
    return dense, expert


def _activations(model: "Geometry", sharding: Sharding) -> float:
    tokens = sharding.tokens / sharding.tensor  # sequence parallel
    moe = sum(model.moe_layers)
    layers = len(model.moe_layers)
    kept = tokens * (layers * _attention(model, sharding) + moe * _experts(model, sharding))
    kept += tokens * (layers - moe) * _mlp(model.ffn_hidden_size or 0)
    if "full" in sharding.recomputed:
        kept = tokens * layers * _WEIGHT * model.hidden_size
    logits = 0.0
    if sharding.pipeline == 1:  # in bf16, and their gradient in fp32
        logits = sharding.tokens * model.vocab_size / sharding.tensor * (2 + 4)
    return kept * _in_flight(sharding) + logits


def _in_flight(sharding: Sharding) -> float:
    """Micro-batches of the whole depth that the first stage holds: one, and the interleaving's."""
    pipeline, virtual = sharding.pipeline, sharding.virtual
    if virtual > 1:
        return 1 + (pipeline - 1) / (pipeline * virtual)
    return min(1.0, sharding.microbatches / pipeline)


def _attention(model: "Geometry", sharding: Sharding) -> float:
    norms = 2 if "layernorm" in sharding.recomputed else 4
    heads = model.num_attention_heads
    if model.multi_latent_attention:
        head = model.qk_head_dim + model.qk_pos_emb_head_dim
        ranks = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_pos_emb_head_dim
        kept = heads * (2 * head + 2 * model.v_head_dim) + 2 * ranks
    else:
        groups = model.num_query_groups or heads
        kept = (2 * heads + 2 * groups) * model.head_size
    return _WEIGHT * (norms * model.hidden_size + kept)


def _experts(model: "Geometry", sharding: Sharding) -> float:
    if "moe" in sharding.recomputed:
        return 0.0
    width = 2 if "moe_act" in sharding.recomputed else 3
    routed = 2 * model.hidden_size + width * model.moe_ffn_hidden_size
    shared = model.moe_shared_expert_intermediate_size
    return _WEIGHT * model.moe_router_topk * routed + (_mlp(shared) if shared else 0)


def _mlp(width: int) -> float:
    return _WEIGHT * 3 * width
