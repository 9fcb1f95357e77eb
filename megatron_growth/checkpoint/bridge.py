"""What Megatron-Bridge says of a model, as Megatron's arguments.

Bridge converts Hugging Face models. Its checkpoints are Megatron's but for one thing: the common
state holds no `args`. What the model is stands in `run_config.yaml` beside the data, as the fields
of Bridge's `GPTModelProvider`, most of which have the names of Megatron's arguments. The rest is a
table. Bridge also has models that Megatron-LM's GPT is not, with layers or attention of their own;
those are refused, for arguments that describe them do not exist.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_growth.errors import CheckpointError

RUN_CONFIG = "run_config.yaml"

_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_SPECS = frozenset(
    f"megatron.bridge.models.gpt_provider.{name}"
    for name in ("default_layer_spec", "transformer_engine_layer_spec", "local_layer_spec")
)

# Field -> argument and what its value becomes.
_RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "num_moe_experts": ("num_experts", lambda value: value),
    "share_embeddings_and_output_weights": (
        "untie_embeddings_and_output_weights",
        lambda value: not value,
    ),
    "rope_scaling": ("use_rope_scaling", lambda value: value),
    "seq_len_interpolation_factor": ("rotary_seq_len_interpolation_factor", lambda value: value),
    # Of the Hugging Face configuration the longest sequence; how long a run's are it must say.
    "seq_length": ("max_position_embeddings", lambda value: value),
    # A float there, and Megatron's option takes whole numbers.
    "rotary_base": ("rotary_base", lambda value: int(value) if value == int(value) else value),
    # A list in YAML, and Megatron's option takes a pair.
    "window_size": ("window_size", lambda value: value and tuple(value)),
}

# Fields that change what a model computes and have no argument: what they must be.
_FIXED: dict[str, tuple[Any, ...]] = {
    "softmax_scale": (None,),
    "experimental_attention_variant": (None,),
    "heterogeneous_block_specs": (None, False),
    "restore_modelopt_state": (None, False),
    "yarn_rotary_scaling_factor": (None,),
}

_POSITIONS = ("rope", "learned_absolute", "none")

# How the vocabulary was padded is in the tensors.
_LEFT = frozenset({"vocab_size", "make_vocab_size_divisible_by"})


def described_arguments(directory: Path, vocab_rows: int | None) -> Namespace | None:
    """The arguments of the model that Bridge saved in an `iter_*` directory; None where it has
    saved none.

    Args:
        directory: the checkpoint.
        vocab_rows: rows of its word embeddings.

    Raises:
        CheckpointError: no arguments of Megatron describe that model.
    """
    path = directory / RUN_CONFIG
    if not path.is_file():
        return None
    content = _read(path)
    if content.get("train"):
        raise CheckpointError(
            f"{str(path)!r} is of a training run of Megatron-Bridge, whose place in data and "
            "schedule is not read; export the model and import it again"
        )
    model = content["model"]
    _check(path, model)
    arguments = {
        name: value
        for name, value in model.items()
        if not isinstance(value, dict) and name not in _RENAMED and name not in _LEFT
    }
    arguments |= {
        name: convert(model[field]) for field, (name, convert) in _RENAMED.items() if field in model
    }
    heads = model.get("num_attention_heads")
    groups = model.get("num_query_groups") or heads
    saved, tokenizer = content.get("checkpoint") or {}, content.get("tokenizer") or {}
    arguments |= {
        "swiglu": True,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "padded_vocab_size": vocab_rows,
        "tokenizer_type": tokenizer.get("tokenizer_type"),
        "tokenizer_model": tokenizer.get("tokenizer_model"),
        "no_save_optim": not saved.get("save_optim"),
        "no_save_rng": not saved.get("save_rng"),
    }
    return Namespace(**arguments)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert isinstance(content["model"], dict)
    except (ValueError, KeyError, TypeError, AssertionError, yaml.YAMLError):
        raise CheckpointError(
            f"{str(path)!r} describes no model; restore it from another copy of the checkpoint"
        ) from None
    return dict(content)


def _check(path: Path, model: dict[str, Any]) -> None:
    """Refuse by field what Megatron's arguments cannot say."""
    activation = _target(model.get("activation_func"))
    gated = model.get("gated_linear_unit")
    allowed: list[tuple[str, Any, bool]] = [
        ("_target_", model.get("_target_"), model.get("_target_") == _PROVIDER),
        ("transformer_layer_spec", spec := _target(model.get("transformer_layer_spec")),
         spec in _SPECS),
        ("activation_func", activation, activation == "torch.nn.functional.silu"),
        ("gated_linear_unit", gated, gated is True),
        ("position_embedding_type", position := model.get("position_embedding_type"),
         position in _POSITIONS),
        *((name, model.get(name), model.get(name, values[0]) in values)
          for name, values in _FIXED.items()),
    ]  # fmt: skip
    for name, value, known in allowed:
        if not known:
            raise CheckpointError(
                f"model.{name} {value!r} in {str(path)!r} is of a model that no arguments of "
                "Megatron's describe to us; let Megatron rewrite the checkpoint, if it has that "
                "model"
            )


def _target(value: Any) -> Any:
    """Of `{_target_: torch.nn.functional.silu, _call_: false}` what it names."""
    return value.get("_target_") if isinstance(value, dict) else value
