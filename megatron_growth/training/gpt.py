"""What Megatron's ``pretrain()`` asks of its caller: a model, a batch, a loss and the datasets.

Upstream keeps these in a script, ``pretrain_gpt.py``, that is not part of the megatron-core wheel.
This module is ours, for the same job: GPT models (dense, MoE, MLA, MTP) and hybrid layer patterns,
built by upstream's own builders from upstream's own arguments, on Megatron's indexed datasets or on
its mock data. Nothing here knows about growth or about CPUs.

What needs another batch layout than one sample per row (SFT, fill-in-the-middle, document masking,
hybrid context parallelism, reinforcement learning) is refused by name.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import megatron.core.datasets.utils as dataset_utils
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, training
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_growth.errors import ConfigError

Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]

_BATCH = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")

_REFUSED = (
    "sft",
    "fim_data",
    "dataloader_inter_document_masking",
    "hybrid_context_parallel",
    "perform_rl_step",
)

# A micro-batch whose loss is this many times the largest seen so far is worth a rerun.
_SPIKE = 10

# GPTDatasetConfig's field -> Megatron's argument.
_DATASET_ARGUMENTS = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "split": "split",
    "multiple_validation_sets": "multiple_validation_sets",
    "full_validation": "full_validation",
    "num_dataset_builder_threads": "num_dataset_builder_threads",
    "path_to_cache": "data_cache_path",
    "mmap_bin_files": "mmap_bin_files",
    "reset_position_ids": "reset_position_ids",
    "reset_attention_mask": "reset_attention_mask",
    "eod_mask_loss": "eod_mask_loss",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "object_storage_cache_path": "object_storage_cache_path",
    "mid_level_dataset_surplus": "mid_level_dataset_surplus",
    "allow_ambiguous_pad_tokens": "allow_ambiguous_pad_tokens",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
}


def run(
    argv: Sequence[str] | None = None,
    *,
    extra_args_provider: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] | None = None,
    args_defaults: dict[str, object] | None = None,
) -> None:
    """Run Megatron's ``pretrain()`` with these arguments; ``sys.argv`` when None is given."""
    with _command_line(argv), _prebuilt_dataset_helpers():
        args = _validated(extra_args_provider, args_defaults or {})
        _refuse_other_batches(args)
        # Looked up at the call, so that a caller may wrap training.pretrain's own pieces.
        training.pretrain(
            pretrain_cfg_container_from_args(args, _model_config(args)),
            train_valid_test_datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            get_embedding_ranks=embedding_ranks,
        )


def _validated(
    extra_args_provider: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] | None,
    args_defaults: dict[str, object],
) -> argparse.Namespace:
    """Megatron's arguments; what it asserts about them is the user's to put right, on one line."""
    try:
        return parse_and_validate_args(extra_args_provider, args_defaults=args_defaults)
    except AssertionError as refusal:
        at = traceback.extract_tb(refusal.__traceback__)[-1]
        said = " ".join(str(refusal).split()) or at.line
        raise ConfigError(
            f"Megatron refuses these arguments: {said} ({Path(at.filename).name}:{at.lineno}); "
            "change them"
        ) from refusal


def _model_config(args: argparse.Namespace):
    if args.hybrid_layer_pattern is not None:
        return hybrid_config_from_args(args)
    return gpt_config_from_args(args)


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The pipeline ranks that hold a copy of the word embeddings and must keep them equal."""
    args = get_args()
    ranks = {pp_ranks[0]}
    if not args.untie_embeddings_and_output_weights:
        ranks.add(pp_ranks[-1])
    if args.mtp_num_layers is not None and len(pp_ranks) > 1:
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    model: MegatronModule,
    return_schedule_plan: bool = False,
):
    """Run one micro-batch; return the output and the function that turns it into the loss."""
    timers, straggler = get_timers(), StragglerDetector()
    timers("batch-generator", log_level=2).start()
    with straggler(bdata=True):
        batch = _batch_on_this_rank(
            data_iterator,
            get_attr_wrapped_model(model, "config"),
            get_attr_wrapped_model(model, "vp_stage"),
        )
    timers("batch-generator").stop()
    # With expert communication overlapped, the schedule wants the plan of the pass, not its result.
    forward = model.build_schedule_plan if return_schedule_plan else model
    with straggler:
        output = forward(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    return output, partial(loss_function, batch["loss_mask"])


def _batch_on_this_rank(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    config: TransformerConfig,
    vp_stage: int | None,
) -> dict[str, torch.Tensor | None]:
    """The batch, read by the first tensor-parallel rank, sent to the others, cut by context."""
    with_mtp = mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )
    if not with_mtp and not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(_BATCH)
    batch: dict[str, torch.Tensor | None] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        batch = {
            key: sample[key].cuda(non_blocking=True) if key in sample else None for key in _BATCH
        }
    batch = _broadcast_to_tensor_parallel_ranks(batch, with_mtp)
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def _broadcast_to_tensor_parallel_ranks(
    batch: dict[str, torch.Tensor | None], with_mtp: bool
) -> dict[str, torch.Tensor | None]:
    args = get_args()
    # Evaluation may run at a micro-batch size of its own; the receiving ranks must know which.
    micro_batch_size = args.micro_batch_size
    if not torch.is_grad_enabled():
        micro_batch_size = getattr(args, "eval_micro_batch_size", None) or micro_batch_size
    return get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=with_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )


def loss_function(loss_mask: torch.Tensor, output: torch.Tensor) -> Loss:
    """The summed loss of the unmasked tokens, their number, and both for the log."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    _check(loss)
    logged = torch.cat([loss.detach().clone().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": logged}


def _check(loss: torch.Tensor) -> None:
    """Let Megatron's rerun machinery look at the loss before it is averaged over ranks."""
    args, machine = get_args(), get_rerun_state_machine()
    spiky = partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
    checks = (
        (args.check_for_nan_in_loss_and_grad, torch.isnan, "NaN in the local loss", True),
        (args.check_for_nan_in_loss_and_grad, torch.isinf, "Inf in the local loss", True),
        (args.check_for_spiky_loss, spiky, "spike in the local loss", False),
    )
    for enabled, rejects, message, fatal in checks:
        if enabled:
            machine.validate_result(
                result=loss,
                rejection_func=rejects,
                message=message,
                tolerance=0.0,  # A forward pass repeated on the same rank is deterministic.
                fatal=fatal,
            )


def train_valid_test_datasets_provider(
    train_valid_test_num_samples: Sequence[int | None], vp_stage: int | None = None
):
    """The train, validation and test datasets, of at least these numbers of samples."""
    args = get_args()
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        train_valid_test_num_samples,
        partial(_builds_datasets, vp_stage),
        _dataset_config(args),
    ).build()


# Every rank calls the provider, and the builder decides who reads (training/training.py 4547).
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def _builds_datasets(vp_stage: int | None) -> bool:
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    args = get_args()
    if is_first_or_last_pipeline_stage(vp_stage) or args.mtp_num_layers is None:
        return is_first_or_last_pipeline_stage(vp_stage)
    # A pipeline layout may put the MTP layers, which read tokens and labels, in the middle.
    return mtp_on_this_rank(
        layout=core_transformer_config_from_args(args).pipeline_model_parallel_layout,
        mtp_num_layers=args.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    counts = None
    if args.per_dataset_sequences_path is not None:
        counts = json.loads(Path(args.per_dataset_sequences_path).read_text(encoding="utf-8"))
    return GPTDatasetConfig(
        blend=blend,
        blend_per_split=blend_per_split,
        tokenizer=get_tokenizer(),
        sequences_per_dataset=counts,
        **{field: getattr(args, name) for field, name in _DATASET_ARGUMENTS.items()},
    )


def _refuse_other_batches(args: argparse.Namespace) -> None:
    for name in _REFUSED:
        if getattr(args, name, False):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} needs a batch that megatron_growth.training.gpt does not build; "
                f"drop the flag, or call Megatron's pretrain() with your own forward_step"
            )


@contextmanager
def _command_line(argv: Sequence[str] | None) -> Iterator[None]:
    """Megatron's parser reads ``sys.argv`` and nothing else (training/arguments.py 131)."""
    if argv is None:
        yield
        return
    original = sys.argv
    sys.argv = [original[0], *argv]
    try:
        yield
    finally:
        sys.argv = original


@contextmanager
def _prebuilt_dataset_helpers() -> Iterator[None]:
    """Do not compile what the wheel already holds compiled.

    ``training/initialize.py`` 178 runs ``make`` in ``core/datasets`` and exits when it fails. A
    checkout of Megatron-LM has the Makefile; the 0.19.2 wheel has the built module instead.
    """
    original = dataset_utils.compile_helpers
    folder = Path(dataset_utils.__file__).parent
    if not (folder / "Makefile").exists() and list(folder.glob("helpers_cpp*.so")):
        dataset_utils.compile_helpers = lambda: None
    try:
        yield
    finally:
        dataset_utils.compile_helpers = original
