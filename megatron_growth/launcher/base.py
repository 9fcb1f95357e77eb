"""Is an existing base what the experiment says it is?

`plan` counts, and the flag check divides, by `model`; training takes the shape from the checkpoint.
Where the checkpoint can be read from here the two are held against each other, field by field.
Where it cannot (a laptop plans for a cluster) nothing is said.
"""

import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_growth.errors import ConfigError
from megatron_growth.geometry import Geometry
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.planning.patterns import written_out

# Sizes that mean something only beside another field.
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_HEADS = ("num_query_groups", "kv_channels")
_ELSEWHERE = ("megatron", "vocab_size", "ffn_hidden_size", "moe_layer_freq", *_LATENT, *_HEADS)
# Options of Megatron that set an argument of another name.
_OPTIONS = {"norm-epsilon": "layernorm_epsilon"}
_PLAIN = tuple(name for name in Geometry.model_fields if name not in _ELSEWHERE)


def check_base(experiment: Experiment) -> None:
    """Hold `model` against the arguments of the base, where there is one that can be read.

    Raises:
        ConfigError: they differ.
        CheckpointError: the base is no checkpoint that can be loaded, or has no arguments.
    """
    base = experiment.base
    if base is None or base.load is None or not os.access(base.load, os.R_OK | os.X_OK):
        return
    from megatron_growth.checkpoint.directory import iteration_directory
    from megatron_growth.checkpoint.source import SourceCheckpoint  # brings torch in

    directory = iteration_directory(base.load, base.iteration)
    args = SourceCheckpoint(directory, weights_only=True).required_args()
    for name, said, has in _differences(experiment.model, args):
        remedy = ", or say it in a stage's `megatron`" if name.startswith("megatron.") else ""
        raise ConfigError(
            f"model.{name} {said!r}: the base {str(directory)!r} has {has!r}; describe the base "
            f"that is there{remedy}, or name another in base.load"
        )


def _differences(model: Geometry, args: Namespace) -> Iterator[tuple[str, Any, Any]]:
    """Fields that differ: name, what the experiment says, what the checkpoint has."""
    for name, said in _described(model, args):
        has = getattr(args, name, said)  # an argument that its Megatron did not know yet
        if (said or None) != (has or None):  # None, 0 and False are all "has none"
            yield name, said, has
    layers = written_out("moe_layer_freq", model.moe_layer_freq, model.num_layers)
    freq = getattr(args, "moe_layer_freq", 1)
    if layers != written_out("moe_layer_freq", freq, model.num_layers):
        yield "moe_layer_freq", model.moe_layer_freq, freq
    rows = getattr(args, "padded_vocab_size", None) or model.vocab_size
    if model.vocab_size > rows:
        yield "vocab_size", model.vocab_size, rows
    for option, value in model.megatron.items():
        name = _OPTIONS.get(option, option.replace("-", "_"))
        has = getattr(args, name, value)
        if (_alone(value) or None) != (_alone(has) or None):
            yield f"megatron.{option}", value, has


def _alone(value: Any) -> Any:
    """Upstream takes `aux_loss` and `[aux_loss]` for the same."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _described(model: Geometry, args: Namespace) -> Iterator[tuple[str, Any]]:
    for name in _PLAIN:
        yield name, getattr(model, name)
    if not all(model.moe_layers):
        yield "ffn_hidden_size", model.ffn_hidden_size
    if model.multi_latent_attention:
        yield from ((name, getattr(model, name)) for name in _LATENT)
        return
    yield "kv_channels", model.head_size
    if model.num_query_groups or getattr(args, "group_query_attention", False):
        yield "num_query_groups", model.num_query_groups or model.num_attention_heads
