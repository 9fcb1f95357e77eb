"""Turns a checkpoint into what Megatron-Bridge 0.6.2 writes: the common state without arguments,
and the model in `run_config.yaml`. Bridge itself is not needed, and not among what is installed."""

import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_growth.checkpoint.source import COMMON_OBJECT

# As written for a Qwen3-MoE, of its 350 fields those that matter and some that do not.
QWEN3 = {
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
    "add_bias_linear": False,
    "attention_backend": {"_args_": [5], "_call_": True, "_name_": "auto"},
    "attention_dropout": 0.0,
    "bf16": True,
    "experimental_attention_variant": None,
    "expert_model_parallel_size": 1,
    "ffn_hidden_size": 96,
    "fp16": False,
    "gated_linear_unit": True,
    "heterogeneous_block_specs": False,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "kv_channels": 32,
    "layernorm_epsilon": 1e-6,
    "make_vocab_size_divisible_by": 4,
    "moe_aux_loss_coeff": 0.001,
    "moe_ffn_hidden_size": 32,
    "moe_layer_freq": 1,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "normalization": "RMSNorm",
    "num_attention_heads": 4,
    "num_layers": 4,
    "num_moe_experts": 8,
    "num_query_groups": 2,
    "params_dtype": {"_call_": False, "_target_": "torch.bfloat16"},
    "position_embedding_type": "rope",
    "qk_layernorm": True,
    "restore_modelopt_state": False,
    "rope_scaling": False,
    "rotary_base": 1000000.0,
    "rotary_percent": 1.0,
    "seq_length": 256,
    "share_embeddings_and_output_weights": False,
    "softmax_scale": None,
    "tensor_model_parallel_size": 1,
    "transformer_layer_spec": {
        "_call_": False,
        "_target_": "megatron.bridge.models.gpt_provider.default_layer_spec",
    },
    "vocab_size": 300,
    "yarn_rotary_scaling_factor": None,
}


def run_config(directory: Path, model: dict[str, Any], **more: Any) -> Path:
    """Write the file."""
    content = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "checkpoint": {"save_optim": False, "save_rng": False},
        "model": model,
        "tokenizer": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "qwen3"},
        "train": None,
        **more,
    }
    path = directory / "run_config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def without_arguments(directory: Path) -> None:
    """Replace the common state by that of an import."""
    buffer = io.BytesIO()
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    state = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": metadata}
    torch.save([state], buffer)
    (directory / "common.distcp").write_bytes(buffer.getvalue())
    contents = FileSystemReader(directory).read_metadata()
    index = MetadataIndex(COMMON_OBJECT)
    assert contents.storage_data[index]
    contents.storage_data[index] = dataclasses.replace(
        contents.storage_data[index],
        relative_path="common.distcp",
        offset=0,
        length=len(buffer.getvalue()),
    )
    (directory / ".metadata").write_bytes(pickle.dumps(contents))
