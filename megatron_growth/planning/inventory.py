"""The tensors of a model that is not on disk yet, from its geometry.

So that a model can be counted, grown and costed before it is trained: `tensors` lists what Megatron
would save of its weights, for `cost` to count as it counts a checkpoint. RMSNorm, SwiGLU and no
biases are taken for granted, as in every model of `configs/`; norms and biases are a ten-thousandth
of the parameters. A test compares the list with what Megatron saves.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_growth.planning.cost import StoredTensor
from megatron_growth.planning.keys import parse
from megatron_growth.planning.pieces import Shape
from megatron_growth.planning.plan import Architecture

if TYPE_CHECKING:
    from megatron_growth.geometry import Geometry

BF16 = 2


def architecture(model: "Geometry") -> Architecture:
    """What growth must know of it."""
    return Architecture(model.num_layers, model.num_experts, model.moe_router_topk, "per_layer")


def tensors(model: "Geometry") -> list[StoredTensor]:
    """Its weights, one key for each layer."""
    return [StoredTensor(parse(key), shape, BF16) for key, shape in _all(model)]


def _all(model: "Geometry") -> Iterator[tuple[str, Shape]]:
    hidden, vocabulary = model.hidden_size, model.vocab_size
    yield "embedding.word_embeddings.weight", (vocabulary, hidden)
    if model.untie_embeddings_and_output_weights:
        yield "output_layer.weight", (vocabulary, hidden)
    yield "decoder.final_layernorm.weight", (hidden,)
    for layer, is_moe in enumerate(model.moe_layers):
        for name, shape in _layer(model, is_moe):
            yield f"decoder.layers.{layer}.{name}", shape
    for module in range(model.mtp_num_layers or 0):
        for name, shape in _mtp(model):
            yield f"mtp.layers.{module}.{name}", shape


def _layer(model: "Geometry", is_moe: bool) -> Iterator[tuple[str, Shape]]:
    yield "input_layernorm.weight", (model.hidden_size,)
    yield "pre_mlp_layernorm.weight", (model.hidden_size,)
    yield from _latent_attention(model) if model.multi_latent_attention else _attention(model)
    yield from _moe(model) if is_moe else _mlp(model, "mlp", model.ffn_hidden_size or 0)


def _attention(model: "Geometry") -> Iterator[tuple[str, Shape]]:
    heads, head = model.num_attention_heads, model.head_size
    groups = model.num_query_groups or heads
    yield "self_attention.linear_qkv.weight", ((heads + 2 * groups) * head, model.hidden_size)
    yield "self_attention.linear_proj.weight", (model.hidden_size, heads * head)
    if model.qk_layernorm:
        yield "self_attention.q_layernorm.weight", (head,)
        yield "self_attention.k_layernorm.weight", (head,)


def _latent_attention(model: "Geometry") -> Iterator[tuple[str, Shape]]:
    hidden, heads, rank = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    queries = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    if model.q_lora_rank is None:
        yield "self_attention.linear_q_proj.weight", (queries, hidden)
    else:
        yield "self_attention.linear_q_down_proj.weight", (model.q_lora_rank, hidden)
        yield "self_attention.linear_q_up_proj.weight", (queries, model.q_lora_rank)
    down = rank + model.qk_pos_emb_head_dim
    yield "self_attention.linear_kv_down_proj.weight", (down, hidden)
    up = heads * (model.qk_head_dim + model.v_head_dim)
    yield "self_attention.linear_kv_up_proj.weight", (up, rank)
    yield "self_attention.linear_proj.weight", (hidden, heads * model.v_head_dim)
    if model.qk_layernorm:
        yield "self_attention.kv_layernorm.weight", (rank,)
        if model.q_lora_rank is not None:
            yield "self_attention.q_layernorm.weight", (model.q_lora_rank,)


def _moe(model: "Geometry") -> Iterator[tuple[str, Shape]]:
    hidden, width, experts = model.hidden_size, model.moe_ffn_hidden_size, model.num_experts
    yield "mlp.router.weight", (experts, hidden)
    yield "mlp.experts.experts.linear_fc1.weight", (experts, 2 * width, hidden)
    yield "mlp.experts.experts.linear_fc2.weight", (experts, hidden, width)
    if model.moe_shared_expert_intermediate_size:
        yield from _mlp(model, "mlp.shared_experts", model.moe_shared_expert_intermediate_size)


def _mlp(model: "Geometry", name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.linear_fc1.weight", (2 * width, model.hidden_size)
    yield f"{name}.linear_fc2.weight", (model.hidden_size, width)


def _mtp(model: "Geometry") -> Iterator[tuple[str, Shape]]:
    hidden = model.hidden_size
    yield "eh_proj.weight", (hidden, 2 * hidden)
    for norm in ("enorm", "hnorm", "final_layernorm"):
        yield f"{norm}.weight", (hidden,)
    # Upstream builds it like the last layer of the decoder.
    for name, shape in _layer(model, model.moe_layers[-1]):
        yield f"transformer_layer.{name}", shape
