"""Counting parameters and bytes, held against the paper's own table."""

import math

import pytest

from megatron_growth.config import DepthConfig, GrowthConfig, WidthConfig
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.cost import StoredTensor, count_parameters, grown_tensors, roads
from megatron_growth.planning.keys import parse
from megatron_growth.planning.plan import Architecture, GrowthPlan

DEPTH, WIDTH = DepthConfig(), WidthConfig()
BASE_17B = Architecture(num_layers=28, num_experts=96, top_k=6, key_form="stacked")
MOMENTS = ("exp_avg", "exp_avg_sq")


def stored(shapes: dict[str, tuple[int, ...]], itemsize: int = 2) -> list[StoredTensor]:
    return [StoredTensor(parse(text), shape, itemsize) for text, shape in shapes.items()]


def paper_17b() -> list[StoredTensor]:
    """The paper's 17B: hidden 2048, expert ffn 1024, SwiGLU, GQA; head counts and vocabulary are
    inferred."""
    layers, experts, hidden, ffn, kv, vocab = 28, 96, 2048, 1024, 512, 190464
    return stored(
        {
            "embedding.word_embeddings.weight": (vocab, hidden),
            "output_layer.weight": (vocab, hidden),
            "decoder.final_layernorm.weight": (hidden,),
            "decoder.layers.self_attention.linear_qkv.weight": (layers, hidden + 2 * kv, hidden),
            "decoder.layers.self_attention.linear_proj.weight": (layers, hidden, hidden),
            "decoder.layers.pre_mlp_layernorm.weight": (layers, hidden),
            "decoder.layers.mlp.router.weight": (layers, experts, hidden),
            "decoder.layers.mlp.experts.experts.linear_fc1.weight": (
                layers,
                experts,
                2 * ffn,
                hidden,
            ),
            "decoder.layers.mlp.experts.experts.linear_fc2.weight": (layers, experts, hidden, ffn),
        }
    )


def grow(**growth: object) -> GrowthPlan:
    return build_plan(GrowthConfig.model_validate(growth), BASE_17B)


# Billions, total and activated, as the paper prints them; PAPER.md, "Models".
@pytest.mark.parametrize(
    "growth, total, activated",
    [({"depth": DEPTH}, 35.2, 3.5), ({"depth": DEPTH, "width": WIDTH}, 69.0, 5.6)],
    ids=["35B", "70B"],
)
def test_growing_the_papers_17b_gives_the_papers_parameter_counts(growth, total, activated):
    plan = grow(**growth)
    count = count_parameters(grown_tensors(plan, paper_17b()), plan.target)
    assert count.activated
    assert round(count.total / 1e9, 1) == total
    assert round(count.activated.parameters / 1e9, 1) == activated


def test_the_base_has_the_papers_parameters_and_chinchilla_budget():
    count = count_parameters(paper_17b(), BASE_17B)
    assert count.activated
    assert (round(count.total / 1e9, 1), round(count.activated.parameters / 1e9, 1)) == (18.0, 2.1)
    assert count.activated.chinchilla_flops == pytest.approx(5.3e20, rel=0.05)  # 17B: 5.3e20
    assert count.activated.chinchilla_flops == 120 * count.activated.parameters**2


def test_only_routed_experts_are_activated_in_part():
    tensors = stored(
        {
            "embedding.word_embeddings.weight": (10, 4),
            "decoder.layers.mlp.router.weight": (2, 8, 4),
            "decoder.layers.mlp.experts.experts.linear_fc1.weight": (2, 8, 6, 4),
            "decoder.layers.mlp.shared_experts.linear_fc1.weight": (2, 6, 4),
        }
    )
    count = count_parameters(tensors, Architecture(2, 8, 2, "stacked"))
    assert (count.total, count.embeddings, count.experts) == (40 + 64 + 384 + 48, 40, 384)
    assert count.activated
    assert count.activated.parameters == 40 + 64 + 384 * 2 // 8 + 48
    assert count.activated.without_embeddings == count.activated.parameters - 40
    assert count.without_embeddings == count.total - 40


def test_a_dense_model_activates_everything():
    tensors = stored({"decoder.layers.mlp.linear_fc1.weight": (2, 6, 4)})
    count = count_parameters(tensors, Architecture(2, 0, None, "stacked"))
    assert count.activated
    assert count.activated.parameters == count.total == 48


def test_activated_parameters_are_unknown_where_top_k_is():
    tensors = stored({"decoder.layers.mlp.experts.experts.linear_fc1.weight": (2, 8, 6, 4)})
    assert count_parameters(tensors, Architecture(2, 8, None, "stacked")).activated is None


def test_optimizer_states_and_router_statistics_are_no_parameters():
    router = "decoder.layers.mlp.router.weight"
    shapes = {router: (2, 8, 4), "decoder.layers.mlp.router.expert_bias": (2, 8)}
    shapes |= {f"optimizer.state.{state}.{router}": (2, 8, 4) for state in MOMENTS}
    assert count_parameters(stored(shapes), Architecture(2, 8, 2, "stacked")).total == 64


def test_per_layer_keys_count_as_the_stack_does():
    shape = (8, 6, 4)
    name = "mlp.experts.experts.linear_fc1.weight"
    per_layer = stored({f"decoder.layers.{i}.{name}": shape for i in range(3)})
    stack = stored({f"decoder.layers.{name}": (3, *shape)})
    growth = GrowthConfig(depth=DEPTH, width=WIDTH)
    counts = []
    for tensors, form, target in [
        (stack, "stacked", "stacked"),
        (per_layer, "per_layer", "per_layer"),
        (per_layer, "per_layer", "stacked"),
    ]:
        plan = build_plan(growth, Architecture(3, 8, 2, form), target_form=target)
        counts.append(count_parameters(grown_tensors(plan, tensors), plan.target))
    assert counts[0].total == 6 * 2 * math.prod(shape)
    assert counts[0] == counts[1] == counts[2]


def test_roads_count_bytes_of_weights_and_optimizer_states():
    name = "decoder.layers.mlp.router.weight"
    states = {f"optimizer.state.{state}.{name}": (28, 96, 4) for state in MOMENTS}
    base = stored({name: (28, 96, 4)}, itemsize=2) + stored(states, itemsize=4)
    load, copy = roads(grow(depth=DEPTH, width=WIDTH), base)
    source = 28 * 96 * 4 * (2 + 4 + 4)
    assert (load.read, load.written, load.delivered) == (source, 0, 4 * source)
    assert (copy.read, copy.written, copy.delivered) == (
        source + 4 * source,
        4 * source,
        4 * source,
    )


def test_reset_neither_reads_nor_delivers_optimizer_states():
    name = "decoder.layers.mlp.router.weight"
    base = stored({name: (28, 96, 4), f"optimizer.state.exp_avg.{name}": (28, 96, 4)})
    load, _ = roads(grow(depth=DEPTH, optimizer="reset"), base)
    assert load.read == 28 * 96 * 4 * 2
