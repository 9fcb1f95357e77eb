"""The router rules as values; that they are true is shown in
tests/megatron/test_router_rules.py."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_growth.checkpoint.common_state import architecture_changes
from megatron_growth.config import GrowthConfig
from megatron_growth.errors import PlanError
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.plan import Architecture, GrowthPlan
from megatron_growth.planning.router import Router, read_router
from megatron_growth.planning.rules import apply

SOFTMAX = Router(num_experts=8, top_k=2)
SIGMOID = replace(SOFTMAX, score_function="sigmoid")
BIASED = replace(SIGMOID, expert_bias=True)
PARKED = {"top_k": "keep", "parked": True}
GROUPED = replace(SIGMOID, top_k=3, num_groups=4, group_topk=2)


def _said(router: Router, m: int = 2, **how) -> list[tuple[str, str]]:
    return [(note.severity, note.argument) for note in apply(router, m, **how).notes]


def test_a_router_is_read_from_megatrons_arguments() -> None:
    args = Namespace(
        num_experts=8,
        moe_router_topk=3,
        moe_router_score_function="sigmoid",
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
        moe_z_loss_coeff=1e-3,
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"],
        moe_aux_loss_coeff=[0.0, 1e-4],
        moe_router_bias_update_rate=2e-3,
        moe_router_enable_expert_bias=True,
        moe_apply_probs_on_input=False,
        moe_expert_capacity_factor=None,
        moe_router_dtype=None,
        bf16=True,
    )
    assert read_router(args) == replace(
        GROUPED, scaling_factor=2.5, z_loss_coeff=1e-3, balancing=("aux_loss", "seq_aux_loss"),
        aux_loss=True, expert_bias=True, bias_update_rate=2e-3, half_precision=True,
    )  # fmt: skip
    args.moe_router_dtype = "fp32"
    assert not read_router(args).half_precision


def test_what_the_arguments_lack_is_upstreams_default() -> None:
    assert read_router(Namespace(num_experts=8)) == SOFTMAX
    assert read_router(Namespace(num_experts=None)) is None
    assert read_router(None) is None


@pytest.mark.parametrize("router", [SOFTMAX, SIGMOID, replace(SOFTMAX, top_k=1, pre_softmax=True)])
def test_a_plain_router_grows_without_a_word(router: Router) -> None:
    growth = apply(router, 3)
    assert (growth.order, growth.arguments, growth.notes) == ("interleave", (), ())


def test_groups_are_rewritten_when_appended_and_only_then() -> None:
    assert apply(replace(GROUPED, top_k=4), 2).arguments == ()
    appended = (("moe_router_num_groups", 8), ("moe_router_group_topk", 4))
    growth = apply(GROUPED, 2)
    assert (growth.order, growth.arguments) == ("append", appended)
    assert [note.text for note in growth.notes] == [
        "moe_router_num_groups 4 -> 8: each clone of a group is a group",
        "moe_router_group_topk 2 -> 4: a token uses all clones of its groups",
    ]
    assert apply(replace(GROUPED, top_k=4), 2, order="append").arguments == appended
    assert apply(GROUPED, 2, top_k="keep").arguments == ()
    assert apply(GROUPED, 2, order="append", top_k="keep").arguments == (
        ("moe_router_num_groups", 8),
    )
    assert apply(replace(GROUPED, balancing=("sinkhorn",)), 2).order == "interleave"


def test_a_kept_top_k_is_told_of_parking_where_that_is_possible() -> None:
    (note,) = apply(BIASED, 2, top_k="keep").notes
    assert note.text.endswith("`top_k: scale` keeps it, and so does `clones: parked`")
    for router in (SOFTMAX, replace(BIASED, score_function="sqrtsoftplus")):
        (note,) = apply(router, 2, top_k="keep").notes
        assert note.text.endswith("the loss will jump; `top_k: scale` keeps it")


def test_parking_says_when_clones_come_into_use() -> None:
    (note,) = apply(replace(BIASED, bias_update_rate=5e-3), 2, **PARKED).notes
    assert "moe_router_bias_update_rate 0.005, so the first" in note.text
    assert "after some 100 steps, most by 200 " in note.text
    capacity = apply(replace(BIASED, capacity_factor=1.5), 3, **PARKED)
    assert capacity.arguments == (("moe_expert_capacity_factor", 4.5),)


def test_a_scaling_factor_is_multiplied_where_one_clone_of_softmax_is_taken() -> None:
    router = replace(SOFTMAX, top_k=1, pre_softmax=True)
    growth = apply(replace(router, scaling_factor=2.5), 2, top_k="keep")
    assert growth.arguments == (("moe_router_topk_scaling_factor", 5.0),)
    assert growth.notes[-1].text.startswith("moe_router_topk_scaling_factor 2.5 -> 5: ")
    assert (
        apply(router, 3, top_k="keep")
        .notes[-1]
        .text.startswith("moe_router_topk_scaling_factor none -> 3: ")
    )
    assert apply(replace(router, top_k=2), 2, top_k="keep").arguments == ()


@pytest.mark.parametrize(
    ("router", "how", "said"),
    [
        (replace(SOFTMAX, z_loss_coeff=1e-3), {}, [("warning", "moe_z_loss_coeff")]),
        (replace(SOFTMAX, half_precision=True), {}, [("warning", "moe_router_dtype")]),
        (replace(SOFTMAX, top_k=8, half_precision=True), {}, []),
        (replace(SOFTMAX, capacity_factor=1.0), {}, []),
        (SOFTMAX, {"order": "append"}, [("note", "num_experts")]),
        (SOFTMAX, {"top_k": "keep"}, [("warning", "moe_router_topk")]),
        (replace(SIGMOID, top_k=1), {"top_k": "keep"}, [("warning", "moe_router_topk")]),
        (
            replace(SIGMOID, expert_bias=True, capacity_factor=1.0),
            {"top_k": "keep"},
            [("warning", "moe_router_topk"), ("warning", "moe_expert_capacity_factor")],
        ),
        (
            replace(BIASED, capacity_factor=1.0, half_precision=True),
            PARKED,
            [
                ("warning", "moe_router_dtype"),
                ("note", "moe_expert_capacity_factor"),
                ("note", "moe_router_bias_update_rate"),
            ],
        ),
            (
            replace(BIASED, aux_loss=True, bias_update_rate=0.0, z_loss_coeff=1e-3),
            {**PARKED, "order": "append"},
            [
                ("warning", "moe_z_loss_coeff"),
                ("warning", "moe_aux_loss_coeff"),
                ("warning", "num_experts"),
                ("warning", "moe_router_bias_update_rate"),
            ],
        ),
        (
            replace(SOFTMAX, balancing=("quantile_balancing",)),
            {"top_k": "keep"},
            [("warning", "moe_router_topk"), ("warning", "moe_router_load_balancing_type")],
        ),
    ],
)  # fmt: skip
def test_what_is_said(router: Router, how: dict, said: list[tuple[str, str]]) -> None:
    assert _said(router, **how) == said


@pytest.mark.parametrize(
    ("router", "how", "message"),
    [
        (
            replace(SIGMOID, top_k=1),
            {},
            "moe_router_score_function 'sigmoid' weighs one expert by its score, but divides "
            "those of several by their sum, so top-1 cannot become top-2 and keep the function; "
            "use `top_k: keep`",
        ),
        (
            replace(SOFTMAX, top_k=1, balancing=("sinkhorn",)),
            {},
            "moe_router_load_balancing_type 'sinkhorn' weighs one expert by sigmoid, but several "
            "by softmax, so top-1 cannot become top-2 and keep the function; use `top_k: keep`",
        ),
        (
            replace(SOFTMAX, top_k=1, pre_softmax=True, probs_on_input=True),
            {},
            "moe_apply_probs_on_input works with top-1 alone, so top-1 cannot become top-2; "
            "use `top_k: keep`",
        ),
        (
            GROUPED,
            {"order": "interleave"},
            "order 'interleave' changes the groups that a token uses: each is scored by its best "
            "2 * 3 // 2 = 3 experts, which are not 2 clones of the best 3 // 2 = 1; use `order: "
            "auto`",
        ),
        (
            SIGMOID,
            PARKED,
            "clones 'parked' need the router to select by expert_bias, which this one, without "
            "moe_router_enable_expert_bias, does not; use `clones: active` with `top_k: scale`",
        ),
        (
            replace(BIASED, balancing=("quantile_balancing",)),
            PARKED,
            "clones 'parked' need the router to select by expert_bias, which this one, with "
            "moe_router_load_balancing_type 'quantile_balancing', does not; use `clones: active` "
            "with `top_k: scale`",
        ),
        (
            replace(BIASED, score_function="sqrtsoftplus"),
            PARKED,
            "moe_router_score_function 'sqrtsoftplus' has scores without an upper bound, so no "
            "expert_bias parks a clone for every token; use `clones: active` with `top_k: scale`",
        ),
        (
            replace(BIASED, top_k=1, num_groups=4, group_topk=2),
            {**PARKED, "order": "append"},
            "order 'append' with parked clones makes 2 times as many groups, and groups are scored "
            "by their best 1 // 2 = 0 experts, so any may be used; use `order: interleave`",
        ),
        (
            replace(SOFTMAX, score_function="entmax"),
            {"top_k": "keep"},
            "moe_router_score_function 'entmax' is not known, so neither is what cloning does to "
            "it; known: softmax, sigmoid, sqrtsoftplus",
        ),
        (
            replace(SOFTMAX, balancing=("auction",)),
            {},
            "moe_router_load_balancing_type 'auction' is not known, so neither is what cloning "
            "does to it; known: aux_loss, seq_aux_loss, global_aux_loss, sinkhorn, "
            "quantile_balancing, none",
        ),
    ],
)
def test_what_is_refused(router: Router, how: dict, message: str) -> None:
    with pytest.raises(PlanError) as refusal:
        apply(router, 2, **how)
    assert str(refusal.value) == message


# -- in the plan

SOURCE = Architecture(num_layers=4, num_experts=8, top_k=3, key_form="stacked")


def _plan(
    growth: dict, router: Router | None = GROUPED, source: Architecture = SOURCE
) -> GrowthPlan:
    return build_plan(GrowthConfig.model_validate(growth), source, router=router)


def test_the_plan_takes_order_and_arguments_from_the_rules() -> None:
    plan = _plan({"width": {}})
    assert plan.experts.order == "append"
    changes = architecture_changes(Namespace(num_layers=4), plan)
    assert changes == {
        "num_experts": 16,
        "moe_router_topk": 6,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
    }
    assert GrowthPlan.from_json(plan.to_json()) == plan


def test_a_plan_without_rewrites_is_written_as_ever() -> None:
    written = json.loads(_plan({"width": {}}, SOFTMAX).to_json())
    assert not {"arguments", "parked"} & written.keys()


def test_a_plan_parks_clones() -> None:
    parked = {"width": {"top_k": "keep", "clones": "parked"}}
    plan = _plan(parked, replace(BIASED, top_k=3))
    assert (plan.parked, plan.target.top_k, plan.target.num_experts) == (True, 3, 16)
    assert GrowthPlan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="holds no Megatron arguments that say so; use `clones: a"):
        _plan(parked, None)


@pytest.mark.parametrize("growth", [{"depth": {}}, {"width": {"order": "interleave"}}])
def test_without_width_or_without_a_router_no_rule_is_applied(growth: dict) -> None:
    plan = _plan(growth, GROUPED if "depth" in growth else None)
    assert (plan.experts.order, plan.arguments) == ("interleave", ())


def test_more_experts_for_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(PlanError) as refusal:
        _plan({"width": {}}, SOFTMAX, replace(SOURCE, top_k=9))
    assert str(refusal.value) == (
        "moe_router_topk (9) must not be above num_experts (8); "
        "the checkpoint's arguments are not those of a model that ran"
    )
