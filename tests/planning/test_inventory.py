"""Models that are not on disk, counted against what their makers published."""

import pytest

from megatron_growth.geometry import Geometry
from megatron_growth.planning.cost import count_parameters
from megatron_growth.planning.inventory import architecture, tensors

QWEN3_30B = {
    "num_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 4,
    "kv_channels": 128, "num_experts": 128, "moe_router_topk": 8, "moe_ffn_hidden_size": 768,
    "qk_layernorm": True, "vocab_size": 151936,
}  # fmt: skip
MIXTRAL_8X7B = {
    "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8,
    "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 14336, "vocab_size": 32000,
}  # fmt: skip
DEEPSEEK_V3 = {
    "num_layers": 61, "hidden_size": 7168, "num_attention_heads": 128, "num_experts": 256,
    "moe_router_topk": 8, "moe_ffn_hidden_size": 2048, "ffn_hidden_size": 18432,
    "moe_layer_freq": "[0]*3+[1]*58", "moe_shared_expert_intermediate_size": 2048,
    "multi_latent_attention": True, "q_lora_rank": 1536, "qk_layernorm": True, "vocab_size": 129280,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "total", "activated"),
    [
        pytest.param(QWEN3_30B, 30.53e9, 3.35e9, id="Qwen3-30B-A3B"),
        pytest.param(MIXTRAL_8X7B, 46.70e9, 12.88e9, id="Mixtral-8x7B"),
        pytest.param(DEEPSEEK_V3, 671.0e9, 37.5e9, id="DeepSeek-V3"),
    ],
)
def test_published_models_have_their_published_parameters(model, total, activated):
    geometry = Geometry.model_validate(model)
    count = count_parameters(tensors(geometry), architecture(geometry))
    assert count.total == pytest.approx(total, rel=1e-3)
    assert count.activated.parameters == pytest.approx(activated, rel=4e-3)


def test_multi_token_prediction_adds_its_layer_and_projection():
    geometry = Geometry.model_validate({**QWEN3_30B, "num_layers": 2})
    more = geometry.model_copy(update={"mtp_num_layers": 1})
    found = {str(t.key): t.shape for t in tensors(more)}
    added = found.keys() - {str(t.key) for t in tensors(geometry)}
    assert "mtp.layers.0.eh_proj.weight" in added
    assert found["mtp.layers.0.transformer_layer.mlp.router.weight"] == (128, 2048)
