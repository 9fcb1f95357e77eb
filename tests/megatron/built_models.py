"""Builds the models that experiments describe, as Megatron does, and prints their parameters.

A process of its own, for the CPU backend stays in one: `python -m tests.megatron.built_models
FILE...`, each file an experiment; prints a JSON list, for each a mapping of names to shapes.
"""

import json
import sys
from unittest.mock import patch

from megatron_growth.training import cpu_backend

cpu_backend.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe import moe_layer  # noqa: E402
from megatron.training.arguments import core_transformer_config_from_args  # noqa: E402

from megatron_growth.launcher.chain import chain  # noqa: E402
from megatron_growth.launcher.experiment import load_experiment  # noqa: E402
from megatron_growth.launcher.flags import check_flags  # noqa: E402


def main(files):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    print(json.dumps([parameters(file) for file in files]))


def parameters(file):
    experiment = load_experiment(file)
    [args] = check_flags(experiment, chain(experiment))
    config = core_transformer_config_from_args(args)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    mtp = None
    if args.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    # Latent projections ask for Transformer Engine's linear; a plain one has its shapes.
    with patch.multiple(moe_layer, HAVE_TE=True, TELinear=_linear):
        model = GPTModel(
            config,
            spec,
            vocab_size=experiment.model.vocab_size,
            max_sequence_length=args.max_position_embeddings,
            position_embedding_type=args.position_embedding_type,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            mtp_block_spec=mtp,
        )
    return {name: list(tensor.shape) for name, tensor in model.named_parameters()}


def _linear(columns, rows, *, bias, **_):
    return torch.nn.Linear(columns, rows, bias=bias)


if __name__ == "__main__":
    main(sys.argv[1:])
