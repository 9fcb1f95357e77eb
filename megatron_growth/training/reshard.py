"""Saving a base's optimizer state in the format that can be grown.

Megatron's default format for the distributed optimizer, `dp_reshardable`, is keyed by flat buffers:
no tensor has a name there, so nothing can be grown. `fully_reshardable` has one entry for each
tensor. Megatron itself turns the one into the other: it loads at the layout of the base, trains no
step, and saves. Everything that this run needs to be told stands in the base's own arguments.
"""

import argparse
from pathlib import Path

from megatron_growth.checkpoint.directory import TRACKER, iteration_directory
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.errors import CheckpointError, ConfigError
from megatron_growth.training import arguments

# The base's layout and numerics: its flat buffers are cut by them.
_LAYOUT = (
    "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers", "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split", "context_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "bf16", "fp16", "use_distributed_optimizer", "micro_batch_size",
    "global_batch_size", "transformer_impl", "moe_grouped_gemm", "optimizer", "ddp_bucket_size",
    "ddp_num_buckets", "overlap_grad_reduce", "overlap_param_gather",
)  # fmt: skip


def reshard_arguments(load: str | Path, save: str | Path, extra: list[str]) -> list[str]:
    """The command line of the run that loads `load` and saves it, fully reshardable, to `save`.

    Args:
        load: Megatron checkpoint directory of the base.
        save: where to; must not hold a checkpoint.
        extra: arguments of the user's, which win over the base's.

    Raises:
        CheckpointError: the base has no optimizer state of that format.
        ConfigError: `save` already holds a checkpoint.
    """
    directory = iteration_directory(load)
    if (Path(save) / TRACKER).exists():
        raise ConfigError(
            f"--save {str(save)!r} already holds a checkpoint; give an empty directory"
        )
    source = SourceCheckpoint(directory, weights_only=True)
    state, args = source.common_state or {}, source.args
    found = state.get("content_metadata", {}).get("distrib_optim_sharding_type")
    if args is None or found != "dp_reshardable":
        raise CheckpointError(
            f"checkpoint {str(directory)!r} has optimizer state of format {found!r}, not "
            "'dp_reshardable'; there is nothing to change"
        )
    words = arguments.completed(extra, args)
    layout = {
        name: getattr(args, name, None)
        for name in _LAYOUT
        if name not in arguments.given_arguments(extra)
    }
    return [
        *words,
        *arguments.render(layout),
        *_no_step(state["iteration"]),
        "--load",
        str(load),
        "--save",
        str(save),
    ]


def _no_step(iteration: int) -> list[str]:
    """Load, train nothing, save: upstream saves at the end unless the iteration is a multiple of
    the interval."""
    return [
        "--train-iters", str(iteration), "--save-interval", str(iteration + 1), "--eval-iters", "0",
        "--eval-interval", "1000", "--mock-data", "--num-workers", "0",
        "--override-opt-param-scheduler", "--dist-ckpt-optim-fully-reshardable", "--ckpt-format",
        "torch_dist",
    ]  # fmt: skip


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """`--load` and `--save`, and the rest."""
    parser = argparse.ArgumentParser(prog="megatron_growth.reshard", allow_abbrev=False)
    parser.add_argument("--load", required=True, help="Megatron checkpoint directory of the base")
    parser.add_argument(
        "--save", required=True, help="directory for the same checkpoint, fully reshardable"
    )
    return parser.parse_known_args(argv)
