"""The tensors of a model that is not on disk yet, from its geometry.

So that a model can be counted, grown and costed before it is trained: `tensors` lists what Megatron
would save of its weights, for `cost` to count as it counts a checkpoint.
tests/megatron/test_inventory.py builds Megatron's models and compares, parameter for parameter.
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
    yield from _norm(model, "decoder.final_layernorm", hidden)
    for layer, is_moe in enumerate(model.moe_layers):
        for name, shape in _layer(model, is_moe):
            yield f"decoder.layers.{layer}.{name}", shape
    for module in range(model.mtp_num_layers or 0):
        for name, shape in _mtp(model):
            yield f"mtp.layers.{module}.{name}", shape


def _layer(model: "Geometry", is_moe: bool) -> Iterator[tuple[str, Shape]]:
    yield from _norm(model, "input_layernorm", model.hidden_size)
    yield from _norm(model, "pre_mlp_layernorm", model.hidden_size)
    yield from _latent_attention(model) if model.multi_latent_attention else _attention(model)
    yield from _moe(model) if is_moe else _mlp(model, "mlp", model.ffn_hidden_size or 0)


def _attention(model: "Geometry") -> Iterator[tuple[str, Shape]]:
    hidden, heads, head = model.hidden_size, model.num_attention_heads, model.head_size
    groups = model.num_query_groups or heads
    qkv = (heads + 2 * groups) * head
    yield from _linear(model, "self_attention.linear_qkv", qkv, hidden, model.add_qkv_bias)
    yield from _linear(model, "self_attention.linear_proj", hidden, heads * head)
    if model.qk_layernorm:
        yield from _norm(model, "self_attention.q_layernorm", head)
        yield from _norm(model, "self_attention.k_layernorm", head)


def _latent_attention(model: "Geometry") -> Iterator[tuple[str, Shape]]:
    """Its projections have no biases, but for the last."""
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
    yield from _linear(model, "self_attention.linear_proj", hidden, heads * model.v_head_dim)
    if model.qk_layernorm:
        yield from _norm(model, "self_attention.kv_layernorm", rank)
        if model.q_lora_rank is not None:
            yield from _norm(model, "self_attention.q_layernorm", model.q_lora_rank)


def _moe(model: "Geometry") -> Iterator[tuple[str, Shape]]:
    hidden, experts = model.hidden_size, model.num_experts
    yield from _linear(model, "mlp.router", experts, hidden)
    if model.moe_latent_size:
        yield from _linear(model, "mlp.fc1_latent_proj", model.moe_latent_size, hidden)
        yield from _linear(model, "mlp.fc2_latent_proj", hidden, model.moe_latent_size)
    inside = model.moe_latent_size or hidden
    for name, shape in _mlp(model, "mlp.experts.experts", model.moe_ffn_hidden_size, inside):
        yield name, (experts, *shape)
    if model.moe_shared_expert_intermediate_size:
        yield from _mlp(model, "mlp.shared_experts", model.moe_shared_expert_intermediate_size)
    if model.moe_shared_expert_gate:
        yield "mlp.shared_experts.gate_weight", (1, hidden)


def _mlp(
    model: "Geometry", name: str, width: int, outside: int | None = None
) -> Iterator[tuple[str, Shape]]:
    hidden = outside or model.hidden_size
    yield from _linear(model, f"{name}.linear_fc1", model.fc1_parts * width, hidden)
    yield from _linear(model, f"{name}.linear_fc2", hidden, width)


def _mtp(model: "Geometry") -> Iterator[tuple[str, Shape]]:
    hidden = model.hidden_size
    yield "eh_proj.weight", (hidden, 2 * hidden)
    for norm in ("enorm", "hnorm", "final_layernorm"):
        yield from _norm(model, norm, hidden)
    # Upstream builds it like the last layer of the decoder.
    for name, shape in _layer(model, model.moe_layers[-1]):
        yield f"transformer_layer.{name}", shape


def _linear(
    model: "Geometry", name: str, rows: int, columns: int, bias: bool = False
) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias or model.add_bias_linear:
        yield f"{name}.bias", (rows,)


def _norm(model: "Geometry", name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if model.normalization == "LayerNorm":
        yield f"{name}.bias", (width,)
