"""Megatron's arguments after growth: every one that counts layers, experts or lists layers, and no
other."""

from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_growth import GrowthConfig
from megatron_growth.checkpoint.common_state import (
    architecture_changes,
    grown_args,
    grown_common_state,
)
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.plan import Architecture, GrowthPlan

ARGS = {
    "num_layers": 4,
    "encoder_num_layers": 4,
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_layer_freq": 1,
    "window_attn_skip_freq": None,
    "no_rope_freq": None,
    "linear_attention_freq": None,
    "pipeline_model_parallel_layout": None,
    "hidden_size": 64,
    "moe_router_num_groups": 4,
    "lr": 1e-3,
}


def _plan(**growth) -> GrowthPlan:
    return build_plan(GrowthConfig.model_validate(growth), Architecture(4, 8, 2, "stacked"))


def _changes(plan: GrowthPlan, **args) -> dict:
    before = Namespace(**{**ARGS, **args})
    kept = dict(vars(before))
    grown = grown_args(before, plan)
    assert vars(before) == kept
    assert {**kept, **architecture_changes(before, plan)} == vars(grown)
    return {name: value for name, value in vars(grown).items() if value != kept[name]}


def test_depth_changes_the_layers_alone() -> None:
    assert _changes(_plan(depth={})) == {"num_layers": 8, "encoder_num_layers": 8}


def test_width_changes_experts_and_top_k_alone() -> None:
    assert _changes(_plan(width={"factor": 3})) == {"num_experts": 24, "moe_router_topk": 6}
    assert _changes(_plan(width={"factor": 3, "top_k": "keep"})) == {"num_experts": 24}


@pytest.mark.parametrize(
    "name", ["moe_layer_freq", "window_attn_skip_freq", "no_rope_freq", "linear_attention_freq"]
)
def test_a_list_that_names_every_layer_follows_the_layer_map(name: str) -> None:
    plan = _plan(depth={"method": "map", "map": [0, 1, 3, 2, 3]})
    assert _changes(plan, **{name: [5, 6, 7, 8]})[name] == [5, 6, 8, 7, 8]
    assert name not in _changes(_plan(width={}), **{name: [5, 6, 7, 8]})


# Argument, its integer, and what that makes of the grown model's eight layers: upstream's formula
# for the base's four, worked out by hand, each twice.
PATTERNS = [
    ("moe_layer_freq", 2, [1, 1, 0, 0, 1, 1, 0, 0]),
    ("window_attn_skip_freq", 2, [1, 1, 0, 0, 1, 1, 0, 0]),
    ("no_rope_freq", 4, [0, 0, 0, 0, 0, 0, 1, 1]),
    ("linear_attention_freq", 4, [1, 1, 1, 1, 1, 1, 0, 0]),
]


@pytest.mark.parametrize(("name", "integer", "written_out"), PATTERNS)
def test_a_pattern_given_as_an_integer_is_written_out_before_it_grows(
    name: str, integer: int, written_out
) -> None:
    """Left as it is, layers would change kind: a layer without RoPE would get one."""
    assert _changes(_plan(depth={}), **{name: integer})[name] == written_out


def test_a_pattern_that_is_the_same_for_all_layers_stays_an_integer() -> None:
    """A list would flip the checkpoint's keys from stacked to per-layer."""
    assert "moe_layer_freq" not in _changes(_plan(depth={}), moe_layer_freq=1)


def test_a_pipeline_layout_that_names_the_bases_layers_is_dropped() -> None:
    changes = _changes(_plan(depth={}), pipeline_model_parallel_layout="Et|tt|tL")
    assert changes["pipeline_model_parallel_layout"] is None
    assert "pipeline_model_parallel_layout" not in _changes(
        _plan(width={}), pipeline_model_parallel_layout="Et|tL"
    )


def test_arguments_that_an_older_base_lacks_are_not_made_up() -> None:
    plan = _plan(depth={}, width={})
    assert vars(grown_args(Namespace(num_layers=4), plan)) == {
        "num_layers": 8,
        "num_experts": 16,
        "moe_router_topk": 4,
    }


def test_arguments_that_the_plan_names_are_set() -> None:
    plan = replace(_plan(width={}), arguments=(("moe_router_num_groups", 8), ("lr", 2.0)))
    assert _changes(plan) == {
        "num_experts": 16,
        "moe_router_topk": 4,
        "moe_router_num_groups": 8,
        "lr": 2.0,
    }


def test_what_is_beside_the_arguments_stays() -> None:
    state = {"iteration": 3, "optimizer": {"a": 1}, "args": Namespace(**ARGS)}
    grown = grown_common_state(state, _plan(depth={}))
    assert {name: value for name, value in grown.items() if name != "args"} == {
        "iteration": 3,
        "optimizer": {"a": 1},
    }
    assert grown["args"].num_layers == 8
    assert state["args"].num_layers == 4
    assert "optimizer" not in grown_common_state(state, _plan(depth={}, optimizer="reset"))
    assert "optimizer" in state
    assert grown_common_state({"iteration": 3}, _plan(depth={})) == {"iteration": 3}
