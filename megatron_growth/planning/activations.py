"""What a backward pass needs of the forward pass, in bytes: for one token on one rank.

Read off what Megatron and Transformer Engine save, for bf16 with flash or fused attention, grouped
expert GEMMs and no token dropped:

    residual stream and normed input, twice        4 x 2 hidden
    queries, keys, values, and their result        2 (heads + 2 groups) head + 2 heads head
      with qk_layernorm, what it normed            2 (heads + groups) head
    latent: both compressed, before and after norm 2 x 2 (ranks and the rotary part)
            queries, keys, values, their result    2 heads (2 query head + 2 value head)
    MLP: gate and up, activation                   2 x 2 width + 2 width
    router: scores, probabilities, map, places     17 x experts
    each of its top-k experts: what came to it     2 hidden
                               gate, up, activation   2 x 2 width + 2 width

What comes back from an expert is not kept: its weight is multiplied into the activation, before fc2
(arXiv:2603.07685, "memory-efficient permutation").

Recomputed modules keep less: `layernorm` the normed inputs, where a norm is a kernel of its own
(before experts, and before latent attention; elsewhere it is fused into the linear that follows);
`mla_up_proj` the expanded queries, keys and values; `moe_act` the experts' activation;
`shared_experts`, `mlp` and `moe` all of theirs but the input. `core_attn` gains nothing with flash
attention, which recomputes by itself.
"""

from typing import TYPE_CHECKING

from megatron_growth.planning.inventory import BF16

if TYPE_CHECKING:
    from megatron_growth.geometry import Geometry

_ROUTER = 17  # two fp32, a bool and two int32 for each expert
Modules = frozenset[str]


def layer_bytes(model: "Geometry", layer: int, recomputed: Modules, spread: int = 1) -> int:
    """Kept of one token in one layer.

    Args:
        model: its geometry.
        layer: which.
        recomputed: modules of selective recomputation; `full` keeps the layer's input alone.
        spread: expert-tensor-parallel ranks; each takes in the tokens of all.
    """
    if "full" in recomputed:
        return BF16 * model.hidden_size
    is_moe = model.moe_layers[layer]
    kept = _norms(model, is_moe, recomputed) + _attention(model, recomputed)
    if is_moe:
        return kept + (0 if "moe" in recomputed else _moe(model, recomputed, spread))
    return kept + (0 if "mlp" in recomputed else _mlp(model, model.ffn_hidden_size or 0))


def layer_work(model: "Geometry", layer: int, recomputed: Modules, spread: int = 1) -> int:
    """What comes on top while a layer's backward pass runs: what it recomputes, and the gradients
    of what its MLP or experts keep and give."""
    everything = layer_bytes(model, layer, frozenset(), spread)
    gradients = _mlp(model, model.ffn_hidden_size or 0)
    if model.moe_layers[layer]:
        came = BF16 * model.moe_router_topk * spread * _expert_input(model)
        gradients = _moe(model, frozenset(), spread) + came
    return everything - layer_bytes(model, layer, recomputed, spread) + gradients


def module_bytes(model: "Geometry", recomputed: Modules, spread: int = 1) -> int:
    """Kept of one token in a multi-token-prediction module: a layer, and what joins its inputs."""
    joined = BF16 * 6 * model.hidden_size  # two norms, in and out, and both outputs side by side
    return joined + layer_bytes(model, model.num_layers - 1, recomputed, spread)


def _norms(model: "Geometry", is_moe: bool, recomputed: Modules) -> int:
    freed = (is_moe + model.multi_latent_attention) if "layernorm" in recomputed else 0
    return BF16 * (4 - freed) * model.hidden_size


def _attention(model: "Geometry", recomputed: Modules) -> int:
    heads = model.num_attention_heads
    if model.multi_latent_attention:
        query = model.qk_head_dim + model.qk_pos_emb_head_dim
        ranks = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_pos_emb_head_dim
        expanded = 0 if "mla_up_proj" in recomputed else heads * (2 * query + model.v_head_dim)
        return BF16 * (2 * ranks + expanded + heads * model.v_head_dim)
    groups = model.num_query_groups or heads
    normed = heads + groups if model.qk_layernorm else 0
    return BF16 * (2 * heads + 2 * groups + normed) * model.head_size


def _moe(model: "Geometry", recomputed: Modules, spread: int) -> int:
    width = model.moe_ffn_hidden_size * (model.fc1_parts + ("moe_act" not in recomputed))
    kept = BF16 * model.moe_router_topk * (spread * _expert_input(model) + width)
    shared = model.moe_shared_expert_intermediate_size or 0
    if "shared_experts" not in recomputed:
        kept += _mlp(model, shared)
    if model.moe_latent_size:
        kept += BF16 * 2 * model.moe_latent_size  # into the experts, and out of them
    return kept + _ROUTER * model.num_experts


def _expert_input(model: "Geometry") -> int:
    return model.moe_latent_size or model.hidden_size


def _mlp(model: "Geometry", width: int) -> int:
    return BF16 * (model.fc1_parts + 1) * width
