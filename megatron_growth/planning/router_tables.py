"""What growth does with each router option, as tables: refused, rewritten, warned of, noted.

A row says for which `Case` it holds and what is said of it. `rules.py` says why, and applies them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_growth.planning.router import Router
from megatron_growth.planning.router_case import Case

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
BALANCING_TYPES = (
    "aux_loss",
    "seq_aux_loss",
    "global_aux_loss",
    "sinkhorn",
    "quantile_balancing",
    "none",
)


@dataclass(frozen=True)
class Rule:
    """A row: for what it is about, when it holds, and what is said."""

    argument: str
    when: Callable[[Case], bool]
    text: Callable[[Case], str]


@dataclass(frozen=True)
class Rewrite:
    """A row: an argument whose value must change, when, to what, and why."""

    argument: str
    when: Callable[[Case], bool]
    old: Callable[[Router], int | float | None]
    new: Callable[[Case], int | float]
    reason: str


REFUSALS = (
    Rule(
        "moe_router_score_function",
        lambda c: c.router.score_function not in SCORE_FUNCTIONS,
        lambda c: (
            f"moe_router_score_function {c.router.score_function!r} is not known, so neither is "
            f"what cloning does to it; known: {', '.join(SCORE_FUNCTIONS)}"
        ),
    ),
    Rule(
        "moe_router_load_balancing_type",
        lambda c: bool(set(c.router.balancing) - set(BALANCING_TYPES)),
        lambda c: (
            f"moe_router_load_balancing_type {' '.join(c.router.balancing)!r} is not known, so "
            f"neither is what cloning does to it; known: {', '.join(BALANCING_TYPES)}"
        ),
    ),
    Rule(
        "moe_apply_probs_on_input",
        lambda c: c.router.probs_on_input and c.scales,
        lambda c: (
            f"moe_apply_probs_on_input works with top-1 alone, so top-{c.k} cannot become "
            f"top-{c.m * c.k}; use `top_k: keep`"
        ),
    ),
    Rule(
        "moe_router_load_balancing_type",
        lambda c: c.router.is_sinkhorn and c.k == 1 and c.scales,
        lambda c: (
            "moe_router_load_balancing_type 'sinkhorn' weighs one expert by sigmoid, but several "
            f"by softmax, so top-1 cannot become top-{c.m} and keep the function; use `top_k: keep`"
        ),
    ),
    Rule(
        "moe_router_score_function",
        lambda c: c.router.normalizes and c.k == 1 and c.scales,
        lambda c: (
            f"moe_router_score_function {c.router.score_function!r} weighs one expert by its "
            f"score, but divides those of several by their sum, so top-1 cannot become top-{c.m} "
            "and keep the function; use `top_k: keep`"
        ),
    ),
    Rule(
        "moe_router_group_topk",
        lambda c: c.scales and c.order == "interleave" and not c.groups_stay,
        lambda c: (
            "order 'interleave' changes the groups that a token uses: each is scored by its best "
            f"{c.m} * {c.k} // {c.g} = {c.m * c.k // c.g} experts, which are not {c.m} clones of "
            f"the best {c.k} // {c.g} = {c.k // c.g}; use `order: auto`"
        ),
    ),
    Rule(
        "moe_router_enable_expert_bias",
        lambda c: c.parked and not c.router.selects_by_bias,
        lambda c: (
            "clones 'parked' need the router to select by expert_bias, which this one, "
            f"{_selection(c.router)}, does not; use `clones: active` with `top_k: scale`"
        ),
    ),
    Rule(
        "moe_router_score_function",
        lambda c: c.parked and c.router.score_function != "sigmoid",
        lambda c: (
            f"moe_router_score_function {c.router.score_function!r} has scores without an upper "
            "bound, so no expert_bias parks a clone for every token; use `clones: active` with "
            "`top_k: scale`"
        ),
    ),
    Rule(
        "moe_router_group_topk",
        lambda c: c.parked and c.order == "append" and c.router.is_grouped and c.k < c.g,
        lambda c: (
            f"order 'append' with parked clones makes {c.m} times as many groups, and groups are "
            f"scored by their best {c.k} // {c.g} = 0 experts, so any may be used; use `order: "
            "interleave`"
        ),
    ),
)

REWRITES = (
    Rewrite("moe_router_num_groups",
            lambda c: c.router.is_grouped and c.order == "append",
            lambda r: r.num_groups, lambda c: c.m * (c.router.num_groups or 1),
            "each clone of a group is a group"),
    Rewrite("moe_router_group_topk",
            lambda c: c.router.is_grouped and c.order == "append" and c.scales,
            lambda r: r.group_topk, lambda c: c.m * c.g,
            "a token uses all clones of its groups"),
    Rewrite("moe_router_topk_scaling_factor",
            lambda c: not c.scales and c.k == 1 and c.router.spreads_weight,
            lambda r: r.scaling_factor, lambda c: c.m * (c.router.scaling_factor or 1.0),
            "softmax gives each clone 1/m of the weight, and one clone is taken"),
    Rewrite("moe_expert_capacity_factor",
            lambda c: c.parked and c.router.capacity_factor is not None,
            lambda r: r.capacity_factor, lambda c: c.m * c.capacity,
            "each original has the capacity that it had, for it takes all the tokens"),
)  # fmt: skip

WARNINGS = (
    Rule(
        "moe_router_topk",
        lambda c: c.keeps_active and c.k > 1,
        lambda c: (
            f"top_k: keep sends each token to {c.k} of {c.m * c.router.num_experts} experts, at "
            f"first clones of its top {math.ceil(c.k / c.m)} instead of its top {c.k}: that is "
            f"another function and the loss will jump; {_remedy(c.router)}"
        ),
    ),
    Rule(
        "moe_router_topk",
        lambda c: c.keeps_active and c.k == 1,
        lambda c: (
            "top_k: keep sends each token to one clone, which keeps the function, but only the "
            "noise on router rows tells clones apart, and they share out tokens instead of "
            "splitting every gradient as `optimizer: rescale` assumes: its first updates may be "
            f"sqrt({c.m}) times too large; `optimizer: copy` errs on the small side"
        ),
    ),
    Rule(
        "moe_expert_capacity_factor",
        lambda c: c.keeps_active and c.router.capacity_factor is not None,
        lambda c: (
            f"moe_expert_capacity_factor {c.capacity:g} at a kept top-k leaves a clone 1/{c.m} of "
            "its expert's capacity, while at first one clone may get all tokens; "
            f"{c.m * c.capacity:g} drops no more than the base does"
        ),
    ),
    Rule(
        "moe_router_load_balancing_type",
        lambda c: not c.scales and "quantile_balancing" in c.router.balancing,
        lambda c: (
            f"quantile balancing at a kept top-k needs {c.k} * tokens of a micro-batch divisible "
            f"by {c.m * c.router.num_experts} experts; Megatron stops otherwise"
        ),
    ),
    Rule(
        "moe_z_loss_coeff",
        lambda c: bool(c.router.z_loss_coeff),
        lambda c: (
            f"moe_z_loss_coeff: the z-loss goes from L^2 to (L + ln {c.m})^2, though the output "
            "stays; its pull on the router nearly stays with --moe-z-loss-coeff "
            f"{c.router.z_loss_coeff:g} * L / (L + {math.log(c.m):.3f}), L the root of the z_loss "
            f"that the base logged ({c.even_z_loss:.3g} were all logits 0)"
        ),
    ),
    Rule(
        "moe_router_dtype",
        lambda c: c.router.half_precision and c.k < c.router.num_experts,
        lambda c: (
            "the router computes in 16 bits, where many logits tie: a token whose last two "
            f"candidates tie may get {'the other one' if c.parked else 'clones of both'} (some 3 % "
            "of tokens at 64 experts); --moe-router-dtype fp32 avoids it"
        ),
    ),
    Rule(
        "moe_aux_loss_coeff",
        lambda c: c.parked and c.router.aux_loss,
        lambda c: (
            "moe_aux_loss_coeff: auxiliary losses go by scores without expert_bias, so they count "
            "parked clones as if they took tokens: the output stays, their value and their pull "
            "on the router do not"
        ),
    ),
    Rule(
        "num_experts",
        lambda c: c.parked and c.order == "append",
        lambda c: (
            f"order 'append' puts all originals on the first 1/{c.m} of the expert-parallel ranks, "
            "which take every token while clones are parked; `order: interleave` spreads them"
        ),
    ),
    Rule(
        "moe_router_bias_update_rate",
        lambda c: c.parked and not c.router.bias_update_rate,
        lambda c: (
            "moe_router_bias_update_rate 0: nothing raises the bias of parked clones, so they are "
            "never used; give --moe-router-bias-update-rate"
        ),
    ),
)

NOTES = (
    Rule(
        "num_experts",
        lambda c: c.order == "append" and not c.router.is_grouped and c.scales,
        lambda c: (
            "order 'append' puts clones on other expert-parallel ranks than their original, so a "
            f"token travels to up to {c.m} times as many; `order: interleave` keeps its "
            "destinations"
        ),
    ),
    Rule(
        "moe_router_bias_update_rate",
        lambda c: c.parked and bool(c.router.bias_update_rate),
        lambda c: (
            "clones are parked: the function is exactly kept, whatever the noise; with every step "
            "balancing raises clones and lowers originals by moe_router_bias_update_rate "
            f"{c.router.bias_update_rate:g}, so the first clones take tokens after some "
            f"{c.first_use:.0f} steps, most by {2 * c.first_use:.0f} (more where the biases of "
            "a layer are far apart)"
        ),
    ),
)


def _selection(router: Router) -> str:
    """How a router selects that does not do so by bias."""
    if not router.expert_bias:
        return "without moe_router_enable_expert_bias"
    return f"with moe_router_load_balancing_type {' '.join(router.balancing)!r}"


def _remedy(router: Router) -> str:
    """What keeps the function instead of a kept top-k with clones in use."""
    if router.selects_by_bias and router.score_function == "sigmoid":
        return "`top_k: scale` keeps it, and so does `clones: parked`"
    return "`top_k: scale` keeps it"
