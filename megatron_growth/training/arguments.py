"""The Megatron arguments of the grown model: the base's, grown, unless the user gives them.

A user should not have to repeat what the base checkpoint knows. So the arguments that make a model
what it is are read from the base's, grown, and put on the command line, where Megatron's own parser
finds them and its log shows them. One that the user gives and that differs from the plan is an
error: the checkpoint would not fit it.

Upstream: `load_args_from_checkpoint` (megatron/training/checkpointing.py) does the like for a
resume, but knows fewer arguments and overrides the user silently.
"""

import argparse
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from megatron_growth.checkpoint.common_state import grown_args
from megatron_growth.errors import ConfigError
from megatron_growth.planning.patterns import PATTERN_ARGUMENTS, written_out
from megatron_growth.planning.plan import GrowthPlan

# What makes the model: shapes, and what goes by layer or expert. A run must agree with the
# checkpoint it loads.
ARCHITECTURE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention",
    "num_query_groups", "kv_channels", "position_embedding_type", "no_rope_freq",
    "window_attn_skip_freq", "linear_attention_freq", "normalization", "add_bias_linear",
    "add_qkv_bias", "swiglu", "squared_relu", "openai_gelu", "quick_geglu",
    "untie_embeddings_and_output_weights", "qk_layernorm", "softmax_type", "attention_output_gate",
    "multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim",
    "v_head_dim", "mtp_num_layers", "mtp_use_repeated_layer", "num_experts", "moe_layer_freq",
    "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
    "moe_latent_size", "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk",
    "moe_router_pre_softmax", "moe_router_score_function", "moe_router_enable_expert_bias",
    "moe_apply_probs_on_input",
)  # fmt: skip

# The base's unless the user says otherwise: what its function and its training depend on, and a
# forgotten option would change silently.
INHERITED = (
    "seq_length", "max_position_embeddings", "rotary_base", "rotary_percent", "rotary_interleaved",
    "use_rope_scaling", "rope_scaling_factor", "yarn_beta_fast", "yarn_beta_slow",
    "yarn_original_max_position_embeddings", "rotary_scaling_factor", "mscale", "mscale_all_dim",
    "window_size", "layernorm_epsilon", "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm", "qk_l2_norm", "glu_linear_offset",
    "activation_func_clamp_value", "hidden_dropout", "attention_dropout",
    "moe_router_topk_scaling_factor", "moe_router_load_balancing_type", "moe_aux_loss_coeff",
    "moe_z_loss_coeff", "moe_router_bias_update_rate", "moe_expert_capacity_factor",
    "moe_token_drop_policy", "moe_pad_expert_input_to_capacity", "moe_token_dispatcher_type",
    "moe_router_dtype", "mtp_loss_scaling_factor", "calculate_per_token_loss", "adam_beta1",
    "adam_beta2", "adam_eps", "clip_grad", "seed", "padded_vocab_size", "rope_type",
    "rotary_seq_len_interpolation_factor", "yarn_correction_range_round_to_int", "mrope_section",
    "use_mup", "mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult",
    "mup_base_head_dim", "mup_attn_scale_power", "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size", "moe_router_quantile_balancing_ema",
    "moe_expert_rank_capacity_factor", "mtp_detach_heads", "fp32_residual_connection",
    "apply_query_key_layer_scaling", "use_distributed_optimizer",
)  # fmt: skip

_SCHEDULE = (
    "lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_style",
    "lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_warmup_fraction", "lr_warmup_iters",
    "lr_warmup_samples", "lr_warmup_init",
)  # fmt: skip

# Options that only make sense together: the base's where the user gives none of a family.
FAMILIES = (
    _SCHEDULE,
    ("bf16", "fp16"),
    ("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
    ("tokenizer_type", "tokenizer_model", "vocab_size", "vocab_file", "merge_file",
     "make_vocab_size_divisible_by", "tiktoken_pattern", "tiktoken_num_special_tokens",
     "special_tokens"),
)  # fmt: skip


@cache
def _actions() -> dict[str, argparse.Action]:
    """Megatron's own options by the name of the argument they set."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)
    return actions


def given_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """The Megatron arguments that a command line sets, parsed by Megatron's parser; its defaults
    are left out."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_known_args(list(argv))[0])


def target_arguments(plan: GrowthPlan, base_args: argparse.Namespace) -> list[str]:
    """The grown model's arguments as a command line, those at Megatron's default left out."""
    return completed([], grown_args(base_args, plan))


def completed(argv: Sequence[str], model: argparse.Namespace) -> list[str]:
    """The user's command line with the arguments of `model` put in where it does not give them.

    Args:
        argv: the user's command line.
        model: Megatron's arguments of the model to be loaded, the grown one or that of the run's
            own checkpoint.

    Raises:
        ConfigError: the command line gives one that contradicts the model.
    """
    given = given_arguments(argv)
    for name in ARCHITECTURE:
        if name in given and hasattr(model, name):
            _check_agrees(name, given[name], getattr(model, name), model.num_layers)
    missing = [name for name in (*ARCHITECTURE, *INHERITED) if name not in given]
    for family in FAMILIES:
        missing += [] if given.keys() & set(family) else family
    derived = _derived(model, given)
    return [
        *argv,
        *render({n: getattr(model, n) for n in missing if hasattr(model, n) and n not in derived}),
    ]


def _derived(model: argparse.Namespace, given: dict[str, Any]) -> set[str]:
    """Arguments that are better left to upstream to fill in."""
    # A run counts in samples or in iterations, and upstream refuses the schedule of the other.
    by_samples = "train_samples" in given
    derived = {name for name in _SCHEDULE if name.endswith("_iters" if by_samples else "_samples")}
    # Upstream saves the run's own length as the decay's where none was given: no choice of a user.
    for name in ("iters", "samples"):
        length = getattr(model, f"train_{name}", None)
        if getattr(model, f"lr_decay_{name}", None) == length:
            derived.add(f"lr_decay_{name}")
    if (
        getattr(model, "weight_decay_incr_style", None) == "constant"
    ):  # validate_args refuses them beside it
        derived |= {"start_weight_decay", "end_weight_decay"}
    # The base's padding keeps the softmax as it was; upstream pads anew for each TP. Rows must
    # split evenly, though.
    tensor_parallel = given.get("tensor_model_parallel_size", 1)
    if (getattr(model, "padded_vocab_size", None) or 0) % tensor_parallel:
        derived.add("padded_vocab_size")
    return derived


def _check_agrees(name: str, given: Any, planned: Any, num_layers: int) -> None:
    if name in PATTERN_ARGUMENTS:  # [1, 1, 1, 1] and 1 are the same layers
        same = written_out(name, given, num_layers) == written_out(name, planned, num_layers)
    else:
        same = given == planned
    if not same:
        option = _option(name)
        raise ConfigError(
            f"{option} {given!r} contradicts the checkpoint, which as it is loaded has "
            f"{planned!r}; leave {option} out, it is taken from the base and grown"
        )


def render(values: dict[str, Any]) -> list[str]:
    """Arguments as Megatron's command line writes them; those at their default are left out.

    Raises:
        ConfigError: a value that no option can set.
    """
    words: list[str] = []
    for name, value in values.items():
        action = _actions().get(name)
        if action is None or value is None or value == action.default:
            continue
        words += _words(action, value)
    return words


def _words(action: argparse.Action, value: Any) -> Iterable[str]:
    option = _long(action.option_strings)
    if isinstance(action, argparse.BooleanOptionalAction):
        return [option if value else option.replace("--", "--no-", 1)]
    if isinstance(value, bool):
        if action.const is not value:
            raise ConfigError(
                f"no option of Megatron sets {action.dest} to {value!r}; the base cannot be "
                "described"
            )
        return [option]
    if action.nargs in ("+", "*"):
        return [option, *map(str, value if isinstance(value, list | tuple) else [value])]
    return [option, str(value).replace(" ", "")]


def _option(name: str) -> str:
    return _long(_actions()[name].option_strings)


def _long(options: Sequence[str]) -> str:
    return next(option for option in options if option.startswith("--"))


def has_per_layer_keys(args: argparse.Namespace) -> bool:
    """Whether upstream writes one checkpoint key for each layer
    (megatron/core/transformer/transformer_block.py)."""
    flips = (getattr(args, name, None) for name in ("moe_layer_freq", "linear_attention_freq"))
    return any(isinstance(value, list) or (value or 0) > 1 for value in flips)
