"""Does Megatron take this command line? Asked of Megatron itself, without a GPU and without a job.

Its parser, `validate_args` and the transformer config all run on a machine that has no CUDA device,
once they are told of one: `hopper()` answers the few questions they put to the hardware and to
Transformer Engine as an H100 node would. What none of the three looks at, whether the layers divide
among the virtual pipeline stages, is checked here.

Upstream (0.19.2): arguments.py 1339 and common_utils.py 502 ask for the device; core/utils.py 326
for Transformer Engine's version; transformer_config.py 2651 for its fused permutation.
"""

import argparse
import contextlib
import importlib
import io
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from megatron_growth.checkpoint.common_state import grown_args
from megatron_growth.config import GrowthConfig
from megatron_growth.errors import ConfigError
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.plan import Architecture
from megatron_growth.planning.router import read_router
from megatron_growth.training import arguments, cpu_backend
from megatron_growth.training.substitutions import Substitutions

_TRANSFORMER_ENGINE = "2.14.0"
_H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 10**9)
_DEVICE = {
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: _H100,
    "get_device_name": lambda *_: _H100.name,
}


def check(
    argv: Sequence[str], *, world_size: int, environment: Mapping[str, str], h100: bool = True
) -> argparse.Namespace:
    """Megatron's arguments, validated as they will be on the job's ranks.

    Args:
        argv: Megatron's command line.
        world_size: ranks of the job.
        environment: of the job, as far as it differs from ours.
        h100: check for an H100; False checks for the CPU backend.

    Raises:
        ConfigError: Megatron refuses it; one line.
    """
    if h100:
        with _job(world_size, environment), hopper():
            args = _validated(argv)
    else:
        with _job(world_size, {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **environment}), _no_gpu():
            args = _validated([*argv, *cpu_backend.arguments(argv)])
    _check_layers_divide(args)
    return args


# Kernels of Transformer Engine that the transformer config looks for; None where they are missing.
_KERNELS = {
    "megatron.core.models.common.embeddings.rope_utils": ("fused_apply_rotary_pos_emb",),
    "megatron.core.transformer.moe.moe_utils": (
        "fused_permute",
        "fused_permute_with_probs",
        "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs",
        "fused_unpermute",
    ),
}


@contextlib.contextmanager
def hopper() -> Iterator[None]:
    """While inside, Megatron believes itself on an H100 with Transformer Engine."""
    import megatron.core.utils as core
    from packaging.version import Version

    substitutions = Substitutions()
    with contextlib.ExitStack() as stack:
        stack.callback(substitutions.restore)
        substitutions.replace_all(torch.cuda, _DEVICE)
        substitutions.replace(core, "_te_version", Version(_TRANSFORMER_ENGINE))
        for module, names in _KERNELS.items():
            for name in names:
                substitutions.replace(importlib.import_module(module), name, _kernel)
        yield


def _kernel(*args: object, **kwargs: object) -> None:
    raise RuntimeError("a kernel that is only claimed to be there; nothing is computed in a check")


@contextlib.contextmanager
def _no_gpu() -> Iterator[None]:
    """The one question that the CPU backend answers for `validate_args`."""
    substitutions = Substitutions()
    with contextlib.ExitStack() as stack:
        stack.callback(substitutions.restore)
        substitutions.replace_all(
            torch.cuda,
            {
                "get_device_capability": lambda *_: (0, 0),
                "get_device_properties": lambda *_: SimpleNamespace(name="cpu", major=0, minor=0),
            },
        )
        yield


# What Megatron's checks read of the environment; that of whoever submits is not the job's.
_NOT_OURS = ("CUDA_DEVICE_MAX_CONNECTIONS",)


@contextlib.contextmanager
def _job(world_size: int, environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    for name in _NOT_OURS:
        os.environ.pop(name, None)
    os.environ.update(environment, RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _validated(argv: Sequence[str]) -> argparse.Namespace:
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import add_megatron_arguments, validate_args

    parser = add_megatron_arguments(_Parser(allow_abbrev=False))
    args = parser.parse_args(list(argv))
    args.rank, args.world_size = 0, int(os.environ["WORLD_SIZE"])
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            validate_args(args, {})
            core_transformer_config_from_args(args)
        except (AssertionError, ValueError, RuntimeError) as refusal:
            raise ConfigError(f"Megatron refuses these arguments: {_said(refusal)}") from refusal
    return args


def _said(refusal: Exception) -> str:
    at = traceback.extract_tb(refusal.__traceback__)[-1]
    said = " ".join(str(refusal).split()) or at.line
    return f"{said} ({Path(at.filename).name}:{at.lineno})"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong instead of leaving the process."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(
            f"Megatron's parser refuses: {message}; put that right in a `megatron` section"
        )


def _check_layers_divide(args: argparse.Namespace) -> None:
    pipeline, virtual = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    uneven = (
        args.pipeline_model_parallel_layout
        or args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
    )
    layers = args.num_layers
    layers += args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    stages = pipeline * (virtual or 1)
    if not uneven and layers % stages:
        fitting = [v for v in range(1, layers // pipeline + 1) if layers % (pipeline * v) == 0]
        raise ConfigError(
            f"pipeline ({pipeline}) x virtual ({virtual or 1}) = {stages} must divide the layers "
            f"({layers}); with this pipeline, virtual can be {fitting or 'nothing'}, or give "
            "pipeline-model-parallel-layout"
        )


def grown_command_line(
    argv: Sequence[str], base: argparse.Namespace, growth: GrowthConfig
) -> list[str]:
    """What `megatron_growth.pretrain` makes of a command line when it grows this base.

    Args:
        argv: the user's, `--growth-config` and all.
        base: arguments of the base, as Megatron validated them.
        growth: how it grows.
    """
    form = "per_layer" if arguments.has_per_layer_keys(base) else "stacked"
    source = Architecture(base.num_layers, base.num_experts, base.moe_router_topk, form)
    plan = build_plan(growth, source, router=read_router(base))
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--growth-config")
    return arguments.completed(own.parse_known_args(list(argv))[1], grown_args(base, plan))
