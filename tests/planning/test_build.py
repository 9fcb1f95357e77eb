"""From configuration and base to a plan, and what is refused on the way."""

import pytest

from megatron_growth.config import GrowthConfig
from megatron_growth.errors import PlanError
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.plan import Architecture, NoiseScale

MOE = Architecture(num_layers=4, num_experts=8, top_k=2, key_form="stacked")
DENSE = Architecture(num_layers=4, num_experts=0, top_k=None, key_form="stacked")


def _plan(growth: dict, source: Architecture = MOE, **more):
    return build_plan(GrowthConfig.model_validate(growth), source, **more)


def test_depth_doubles_by_interposition_unless_told_otherwise() -> None:
    plan = _plan({"depth": {}})
    assert plan.layers.sources == (0, 0, 1, 1, 2, 2, 3, 3)
    assert plan.target == Architecture(8, 8, 2, "stacked")
    assert plan.noise == NoiseScale(0.0, 0.0)
    assert plan.experts.is_identity


def test_width_doubles_experts_and_top_k_unless_told_otherwise() -> None:
    plan = _plan({"width": {}})
    assert plan.layers.is_identity
    assert plan.target == Architecture(4, 16, 4, "stacked")
    assert (plan.experts.factor, plan.experts.order) == (2, "interleave")
    assert plan.noise == NoiseScale(0.01, 0.01)


@pytest.mark.parametrize(
    ("depth", "sources"),
    [
        ({"factor": 3}, (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)),
        ({"method": "stacking"}, (0, 1, 2, 3) * 2),
        ({"factor": 2, "skip_first": 1, "skip_last": 1}, (0, 1, 1, 2, 2, 3)),
        ({"method": "stacking", "factor": 3, "skip_first": 2}, (0, 1, 2, 3, 2, 3, 2, 3)),
        ({"target_layers": 6}, (0, 1, 1, 2, 3, 3)),
        ({"target_layers": 5, "skip_last": 3}, (0, 0, 1, 2, 3)),
        ({"method": "map", "map": [3, 0, 1, 2, 3]}, (3, 0, 1, 2, 3)),
    ],
)
def test_the_depth_section_says_which_layers(depth: dict, sources: tuple[int, ...]) -> None:
    plan = _plan({"depth": depth})
    assert plan.layers.sources == sources
    assert plan.target.num_layers == len(sources)


def test_the_width_section_says_which_experts() -> None:
    plan = _plan(
        {
            "width": {
                "factor": 3,
                "order": "append",
                "top_k": "keep",
                "noise": {"experts": 0.5, "router": 0},
            }
        }
    )
    assert plan.target == Architecture(4, 24, 2, "stacked")
    assert plan.experts.order == "append"
    assert plan.noise == NoiseScale(0.5, 0.0)


def test_depth_and_width_grow_together() -> None:
    plan = _plan({"depth": {}, "width": {}, "seed": 7, "optimizer": "copy"})
    assert plan.target == Architecture(8, 16, 4, "stacked")
    assert (plan.seed, plan.optimizer, plan.zero_output) == (7, "copy", False)


def test_the_target_may_have_the_other_key_form() -> None:
    plan = _plan({"depth": {"new_layer_init": "zero_output"}}, target_form="per_layer")
    assert (plan.source.key_form, plan.target.key_form, plan.zero_output) == (
        "stacked",
        "per_layer",
        True,
    )


def test_masters_are_dropped_with_the_optimizer_state_that_holds_them() -> None:
    assert _plan({"width": {}}, masters="param").masters == "param"
    assert _plan({"width": {}, "optimizer": "copy"}, masters="param").masters == "param"
    assert _plan({"width": {}, "optimizer": "reset"}, masters="param").masters is None


def test_a_base_that_does_not_say_its_top_k_grows_without_one() -> None:
    assert _plan({"width": {}}, Architecture(4, 8, None, "per_layer")).target.top_k is None


def test_a_dense_base_grows_in_depth() -> None:
    assert _plan({"depth": {}}, DENSE).target == Architecture(8, 0, None, "stacked")


@pytest.mark.parametrize(
    ("growth", "source", "message"),
    [
        (
            {"width": {"factor": 3}},
            DENSE,
            "width.factor (3) needs experts to clone, but the base is a dense model; "
            "leave `width` out or start from a Mixture-of-Experts base",
        ),
        (
            {"depth": {"skip_first": 3, "skip_last": 3}},
            MOE,
            "skip_first (3) + skip_last (3) leave no layer of 4 to grow; they must sum to less "
            "than 4",
        ),
        (
            {"depth": {}},
            Architecture(4, 2, 3, "stacked"),
            "moe_router_topk (3) must not be above num_experts (2); "
            "the checkpoint's arguments are not those of a model that ran",
        ),
        (
            {"depth": {"target_layers": 4}},
            MOE,
            "target_layers (4) must be above the source's layers (4); growth only adds layers",
        ),
        (
            {"depth": {"method": "map", "map": [0, 1, 2, 3, 4]}},
            MOE,
            "depth.map names layer 4 but the source has layers 0 to 3; use layers of the source "
            "only",
        ),
    ],
)
def test_a_growth_that_the_base_cannot_have_is_refused(
    growth: dict, source: Architecture, message: str
) -> None:
    with pytest.raises(PlanError) as refusal:
        _plan(growth, source)
    assert str(refusal.value) == message
