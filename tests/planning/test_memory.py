"""Memory of the fullest rank, against the one peak that was published, and by hand."""

from dataclasses import replace

import pytest

from megatron_growth.geometry import Geometry
from megatron_growth.planning.inventory import tensors
from megatron_growth.planning.memory import Sharding, all_to_all_bytes, memory
from tests.planning.test_inventory import QWEN3_30B

QWEN = Geometry.model_validate(QWEN3_30B)
SIXTEEN = Sharding(
    tensor=1, pipeline=1, virtual=1, context=1, expert=16, expert_tensor=1, data=16, expert_data=1,
    tokens=4096, microbatches=64, gradient_bytes=2,
)  # fmt: skip


def of(**changes):
    return memory(QWEN, tensors(QWEN), replace(SIXTEEN, **changes))


def test_the_published_peak_is_met():
    """Qwen3-30B-A3B, 16 H100, TP1 PP1 EP16, bf16 gradients: 62.17 GiB (Megatron-Bridge)."""
    assert of().total / 2**30 == pytest.approx(62.17, rel=0.05)


def test_experts_are_divided_by_expert_parallelism_and_the_rest_is_not():
    total = sum(t.numel for t in tensors(QWEN))
    experts = 48 * 128 * 3 * 2048 * 768
    assert of().weights == 2 * (total - experts + experts // 16)
    assert of(expert=1, expert_data=16).weights == 2 * total


def test_the_optimizer_is_spread_over_replicas():
    alone, spread = of(data=1), of(data=16)
    assert alone.optimizer > spread.optimizer
    assert of(expert_data=2).optimizer < spread.optimizer


def test_gradients_are_two_bytes_or_four():
    assert of(gradient_bytes=4).gradients == 2 * of().gradients == 2 * of().weights


def test_recomputing_frees_what_it_recomputes():
    kept = 4096 * 48 * 2
    assert of().activations - of(recomputed=("moe_act",)).activations == kept * 8 * 768
    assert of().activations - of(recomputed=("layernorm",)).activations == kept * 2 * 2048
    assert of(recomputed=("full",)).activations < of(recomputed=("moe",)).activations


def test_a_pipeline_holds_one_depth_in_flight_and_interleaving_a_part_more():
    logits = 4096 * 151936 * 6
    plain = of().activations - logits
    assert of(pipeline=4).activations == pytest.approx(plain)
    assert of(pipeline=4, virtual=4).activations == pytest.approx(plain * (1 + 3 / 16))
    assert of(pipeline=4, microbatches=2).activations == pytest.approx(plain / 2)


def test_a_layer_dispatches_every_token_to_all_its_experts():
    assert all_to_all_bytes(QWEN, SIXTEEN) == 4096 * 8 * 2048 * 2
    assert all_to_all_bytes(QWEN, replace(SIXTEEN, expert=1)) == 0
