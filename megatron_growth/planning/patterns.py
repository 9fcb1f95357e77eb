"""Arguments that say which layers are of which kind, and how they grow with depth.

Upstream lets each be a list with one entry for each layer, or an integer N that stands for a
pattern. A pattern of period N is no pattern of period N after growth, so integers are first written
out. One that says the same of the grown layers stays an integer: a list would flip the model's
checkpoint keys from stacked to per-layer.
"""

from collections.abc import Callable, Sequence

from megatron_growth.planning.layers import LayerMap

Pattern = int | Sequence[int] | None

# Argument -> what integer `freq` means for layer i, counted from 0.
# Upstream: gpt_layer_specs.py (moe), transformer/utils.py (window), transformer_config.py (rope),
# experimental_attention_variant_module_specs.py (linear attention); megatron-core 0.19.
_MEANING: dict[str, Callable[[int, int], int]] = {
    "moe_layer_freq": lambda freq, i: int(i % freq == 0),
    "window_attn_skip_freq": lambda freq, i: int((i + 1) % freq != 0),
    "no_rope_freq": lambda freq, i: int((i + 1) % freq == 0),
    "linear_attention_freq": lambda freq, i: int((i + 1) % freq != 0),
}

PATTERN_ARGUMENTS = tuple(_MEANING)


def written_out(name: str, value: Pattern, num_layers: int) -> list[int] | None:
    """One entry for each layer; None where the argument is not set."""
    if value is None or value == 0:
        return None
    if isinstance(value, int):
        return [_MEANING[name](value, i) for i in range(num_layers)]
    return list(value)


def grown(name: str, value: Pattern, layers: LayerMap) -> Pattern:
    """The argument's value for the grown model."""
    entries = written_out(name, value, layers.num_source)
    if entries is None:
        return value
    wanted = layers.spread(entries)
    if isinstance(value, int) and written_out(name, value, layers.num_target) == wanted:
        return value
    return wanted
