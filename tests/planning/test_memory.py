"""Memory of the fullest rank, by hand; test_published_memory.py holds it against measurements."""

from dataclasses import replace

import pytest

from megatron_growth.geometry import Geometry
from megatron_growth.planning.activations import layer_bytes, layer_work
from megatron_growth.planning.inventory import tensors
from megatron_growth.planning.memory import (
    Sharding,
    all_to_all_bytes,
    delivered_bytes,
    memory,
    rank_memory,
)
from tests.planning.test_inventory import DEEPSEEK_V3, QWEN3_30B

QWEN = Geometry.model_validate(QWEN3_30B)
LATENT = Geometry.model_validate(DEEPSEEK_V3)
SIXTEEN = Sharding(
    tensor=1, pipeline=1, virtual=1, context=1, expert=16, expert_tensor=1, data=16, expert_data=1,
    tokens=4096, microbatches=64, gradient_bytes=2,
)  # fmt: skip


def of(**changes):
    return memory(QWEN, tensors(QWEN), replace(SIXTEEN, **changes))


def test_experts_are_divided_by_expert_parallelism_and_the_rest_is_not():
    total = sum(t.numel for t in tensors(QWEN))
    experts = 48 * 128 * 3 * 2048 * 768
    assert of().weights == 2 * (total - experts + experts // 16)
    assert of(expert=1, expert_data=16).weights == 2 * total


def test_what_tensor_parallelism_does_not_divide_is_whole_on_every_rank():
    held = {t.key.name: t.numel for t in tensors(LATENT) if t.key.layer == 3}
    one = LATENT.model_copy(update={"num_layers": 4, "moe_layer_freq": [0, 0, 0, 1]})
    none = LATENT.model_copy(update={"num_layers": 3, "moe_layer_freq": [0, 0, 0]})
    two = replace(SIXTEEN, tensor=2)
    layer = [memory(model, tensors(model), two).weights // 2 for model in (one, none)]
    whole = ("layernorm", "router", "down_proj")
    divided = {"mlp.experts": 16, **dict.fromkeys(whole, 1)}
    expected = sum(
        size // next((by for part, by in divided.items() if part in name), 2)
        for name, size in held.items()
    )
    assert layer[0] - layer[1] == expected


def test_the_optimizer_is_spread_over_replicas():
    alone, spread = of(data=1), of(data=16)
    assert alone.optimizer > spread.optimizer
    assert of(expert_data=2).optimizer < spread.optimizer


def test_gradients_are_two_bytes_or_four():
    assert of(gradient_bytes=4).gradients == 2 * of().gradients == 2 * of().weights


def test_the_optimizer_takes_what_its_states_take():
    assert of(optimizer_bytes=6).optimizer == of().optimizer / 2


def layer(model, recomputed=(), number=0):
    return layer_bytes(model, number, frozenset(recomputed))


def test_a_layer_keeps_what_its_table_says():
    norms, attention, normed = 4 * 2048, (2 * 32 + 2 * 4) * 128, (32 + 4) * 128
    experts = 8 * (2048 + 3 * 768)
    assert layer(QWEN) == 2 * (norms + attention + normed + experts) + 17 * 128


def test_latent_attention_keeps_the_compressed_and_the_expanded():
    ranks, expanded, result = 1536 + 512 + 64, 128 * (192 + 192 + 128), 128 * 128
    experts = 8 * (7168 + 3 * 2048) + 3 * 2048
    kept = 4 * 7168 + 2 * ranks + expanded + result
    assert layer(LATENT, number=3) == 2 * (kept + experts) + 17 * 256
    assert layer(LATENT) == 2 * (kept + 3 * 18432)  # the first three are dense


@pytest.mark.parametrize(
    ("module", "number", "freed"),
    [
        ("moe_act", 3, 8 * 2048),
        ("layernorm", 3, 2 * 7168),
        ("layernorm", 0, 7168),  # the other norm is fused into the dense layer's fc1
        ("mla_up_proj", 3, 128 * (192 + 192 + 128)),
        ("shared_experts", 3, 3 * 2048),
        ("mlp", 0, 3 * 18432),
        ("mlp", 3, 0),
        ("core_attn", 3, 0),
    ],
)
def test_a_recomputed_module_frees_its_own(module, number, freed):
    assert layer(LATENT, (), number) - layer(LATENT, (module,), number) == 2 * freed


def test_recomputing_norms_frees_the_one_that_stands_alone():
    """With grouped queries the first norm is fused into the linear behind it."""
    assert layer(QWEN) - layer(QWEN, ("layernorm",)) == 2 * 2048


def test_recomputing_layers_keeps_their_inputs_and_one_whole_layer():
    # Behind the loss stands less than behind the layer that is recomputed.
    small = replace(SIXTEEN, recomputed=("full",), pipeline=2, microbatches=2)
    first, _ = rank_memory(QWEN, tensors(QWEN), small)
    kept = 2 * 24 * 2 * 2048
    assert first.activations == 4096 * (kept + layer_work(QWEN, 0, frozenset({"full"})))


def test_the_last_pipeline_rank_has_the_logits_and_the_first_most_micro_batches():
    first, second = rank_memory(QWEN, tensors(QWEN), replace(SIXTEEN, pipeline=2))
    a_layer = 4096 * layer(QWEN)
    work = 4096 * layer_work(QWEN, 0, frozenset())
    assert first.activations == 2 * 24 * a_layer + work
    assert second.activations == 24 * a_layer + 4096 * 151936 * 6


def test_the_fullest_rank_is_told():
    """A large vocabulary and recomputed layers: the last rank is fullest."""
    assert of(pipeline=2).pipeline_rank == 0
    assert of(pipeline=2, recomputed=("full",)).pipeline_rank == 1


def test_multi_token_prediction_brings_an_embedding_and_logits_to_the_last_rank():
    model = QWEN.model_copy(update={"mtp_num_layers": 1})
    two = replace(SIXTEEN, pipeline=2)
    _, without = rank_memory(QWEN, tensors(QWEN), two)
    _, last = rank_memory(model, tensors(model), two)
    added = tensors(model)[len(tensors(QWEN)) :]
    experts = sum(t.numel for t in added if "experts" in t.key.name)
    rest = sum(t.numel for t in added) - experts
    embedding = 151936 * 2048
    assert last.weights - without.weights == 2 * (rest + experts // 16 + embedding)
    logits = 4096 * 151936 * 4
    module = 4096 * (layer(QWEN) + 2 * 6 * 2048)
    assert last.activations - without.activations == logits + module


def test_a_tied_output_layer_is_a_copy_on_the_last_rank():
    tied = QWEN.model_copy(update={"untie_embeddings_and_output_weights": False})
    for pipeline, saved in ((1, 151936 * 2048 * 2), (2, 0)):
        sharding = replace(SIXTEEN, pipeline=pipeline)
        untied_last = rank_memory(QWEN, tensors(QWEN), sharding)[-1]
        assert untied_last.weights - rank_memory(tied, tensors(tied), sharding)[-1].weights == saved


def test_a_rank_is_given_its_weights_and_its_share_of_fp32_states():
    held = of().weights
    assert delivered_bytes(QWEN, tensors(QWEN), SIXTEEN, optimizer=False) == held
    cheap = replace(SIXTEEN, optimizer_bytes=6)  # in memory; on disk they are as ever
    assert delivered_bytes(QWEN, tensors(QWEN), cheap, optimizer=True) == held + of().optimizer


def test_a_layer_dispatches_every_token_to_all_its_experts():
    assert all_to_all_bytes(QWEN, SIXTEEN) == 4096 * 8 * 2048 * 2
    assert all_to_all_bytes(QWEN, replace(SIXTEEN, expert=1)) == 0
