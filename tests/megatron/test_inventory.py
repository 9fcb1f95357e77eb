"""The tensors that we count of a model, against those of the model that Megatron builds."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from megatron_growth.geometry import Geometry
from megatron_growth.planning.inventory import tensors
from tests.launcher.experiments import CONTENT, write
from tests.megatron.driver import REPOSITORY

SMALL = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96,
    "num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_layer_freq": [0, 1],
    "vocab_size": 128,
}  # fmt: skip
LATENT = {
    "multi_latent_attention": True, "kv_lora_rank": 24, "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
SHARED = {"moe_shared_expert_intermediate_size": 80}
MODELS = {
    "plain": {},
    "grouped queries, wide heads": {"num_query_groups": 2, "kv_channels": 32},
    "query-key norms": {"qk_layernorm": True},
    "LayerNorm": {"normalization": "LayerNorm", "qk_layernorm": True},
    "biases": {"add_bias_linear": True},
    "query-key-value biases": {"add_qkv_bias": True},
    "no gate": {"swiglu": False, "megatron": {"squared-relu": True}, **SHARED},
    "shared experts": SHARED,
    "shared experts, gated": {**SHARED, "moe_shared_expert_gate": True},
    "latent experts": {"moe_latent_size": 32, **SHARED},
    "latent experts, biases": {"moe_latent_size": 32, "add_bias_linear": True},
    "tied": {"untie_embeddings_and_output_weights": False},
    "multi-token prediction": {"mtp_num_layers": 2, "normalization": "LayerNorm", **SHARED},
    "latent attention": LATENT,
    "latent attention, norms": {**LATENT, "q_lora_rank": 40, "qk_layernorm": True},
    "latent attention, all": {
        **LATENT, "q_lora_rank": 40, "qk_layernorm": True, "normalization": "LayerNorm",
        "add_bias_linear": True, "mtp_num_layers": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Of each model, the shapes that Megatron builds."""
    directory = tmp_path_factory.mktemp("models")
    files = []
    for number, changes in enumerate(MODELS.values()):
        content = {
            **CONTENT,
            "model": {**SMALL, **changes},
            "cluster": {"device": "cpu", "processes_per_node": 1},
            "stages": CONTENT["stages"][:1],
        }
        files.append(str(write(directory, content, f"{number}.yaml")))
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron.built_models", *files],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(MODELS, json.loads(done.stdout.splitlines()[-1]), strict=True))


# Megatron's names without Transformer Engine -> those of a checkpoint.
_EXPERT = re.compile(r"\.local_experts\.\d+\.")
_MODULE = "mtp_model_layer."


@pytest.mark.parametrize("name", MODELS)
def test_they_are_the_same(built, name):
    found = Counter()
    for parameter, shape in built[name].items():
        stacked = _EXPERT.sub(".experts.", parameter).replace(_MODULE, "transformer_layer.")
        found[stacked, tuple(shape)] += 1
    ours = Counter()
    for tensor in tensors(Geometry.model_validate({**SMALL, **MODELS[name]})):
        # The experts of a layer are one tensor in a checkpoint.
        routed = tensor.key.name.startswith("mlp.experts.")
        shape = tensor.shape[1:] if routed else tensor.shape
        ours[str(tensor.key), shape] += tensor.shape[0] if routed else 1
    assert ours == found
    assert sum(found.values()) > 20
