"""Router options: which keep the function under cloning, and what changes with E and k.

With noise 0 the clones of an expert have one logit, so the top m * k of m * E hold all clones of
the base's top k. The function is kept where the weights of an expert's clones add up to its weight.
From Megatron's formulas, each line held by a test against its router
(megatron/core/transformer/moe/router.py, 0.19):

    softmax after top-k                   kept; upstream refuses k = 1
    softmax before top-k                  kept for any k
    sigmoid, sqrtsoftplus                 kept for k >= 2; one score is a weight, several are shares
    scaling factor, expert_bias           kept; the bias is cloned, and its updates stay alike
    groups G, top-g groups, interleaved   kept if m * (k mod g) < g or g = G; else refused
    groups, appended                      kept with m * G and m * g: each clone of a group is one
    aux, seq-aux and global-aux loss      kept, loss and gradient
    z-loss                                output kept; the loss becomes (lse + ln m)^2
    capacity factor, either drop policy   kept: an expert's capacity stays
    quantile balancing                    as the score function; qb_beta is as expert_bias
    sinkhorn                              kept for k >= 2; sigmoid weighs one expert, softmax more
    moe_apply_probs_on_input              never: upstream has it for top-1 alone
    16-bit router                         up to ties for the last place
    shared experts, latent projections    kept: they stand before or behind the weighted sum
    top-k kept, k = 1                     kept: one clone is taken; softmax before needs factor m
    top-k kept, k >= 2                    never: clones of the top ceil(k / m) are taken
    top-k kept, clones parked             kept at any noise: no clone is selected; see below

What is not kept is refused, unless it was asked for by name (`top_k: keep`), which gets a warning.

Clones are parked by `expert_bias`, which takes part in the selection and in nothing else. That
needs scores with a bound: sigmoid's lie in [0, 1], sqrtsoftplus has none, softmax has no bias
upstream. Groups interleaved keep their sums, for those are of originals; appended, each clone of a
group is a group that comes behind all others, unless groups have no score at all (k < g). An
expert's capacity is k / (m * E) of the tokens, so its factor is multiplied. The losses that balance
or regularize look at all clones whatever their bias: the output stays, these do not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_growth.errors import PlanError
from megatron_growth.planning.experts import ExpertOrder

OrderAsked = Literal["auto", "interleave", "append"]
TopKMode = Literal["scale", "keep"]
Severity = Literal["warning", "note"]

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
class Router:
    """The base's router, as far as its function under growth goes; the defaults are upstream's.

    Attributes:
        num_experts: experts.
        top_k: experts that each token is sent to.
        score_function: what makes logits scores.
        pre_softmax: softmax over all experts rather than over those taken.
        num_groups: groups of experts, None without.
        group_topk: groups that each token may use; None turns groups off.
        scaling_factor: of the weights.
        balancing: load balancing types.
        z_loss_coeff: of the z-loss, None without.
        expert_bias: whether a bias takes part in the selection (aux-loss-free balancing).
        bias_update_rate: by which each step moves the bias of an expert with too many or too few
            tokens.
        aux_loss: whether an auxiliary loss has a coefficient.
        half_precision: whether logits are computed in 16 bits.
        probs_on_input: whether weights multiply the experts' input.
        capacity_factor: of the tokens an expert takes, None without a limit.
    """

    num_experts: int
    top_k: int = 2
    score_function: str = "softmax"
    pre_softmax: bool = False
    num_groups: int | None = None
    group_topk: int | None = None
    scaling_factor: float | None = None
    balancing: tuple[str, ...] = ("aux_loss",)
    z_loss_coeff: float | None = None
    expert_bias: bool = False
    bias_update_rate: float = 1e-3
    aux_loss: bool = False
    half_precision: bool = False
    probs_on_input: bool = False
    capacity_factor: float | None = None

    @property
    def is_sinkhorn(self) -> bool:
        """Sinkhorn has scores of its own and knows no groups."""
        return "sinkhorn" in self.balancing

    @property
    def is_grouped(self) -> bool:
        return bool(self.group_topk) and not self.is_sinkhorn

    @property
    def selects_by_bias(self) -> bool:
        """Sinkhorn and quantile balancing select in ways of their own."""
        return self.expert_bias and not set(self.balancing) & {"sinkhorn", "quantile_balancing"}

    @property
    def normalizes(self) -> bool:
        """Scores are divided by their sum, but only those of more than one expert."""
        return self.score_function != "softmax" and not self.is_sinkhorn

    @property
    def spreads_weight(self) -> bool:
        """Weights are shares of all experts, so that each of m clones has 1/m."""
        return self.score_function == "softmax" and self.pre_softmax and not self.is_sinkhorn


# Megatron argument -> field of a `Router` that it is as it stands.
_FIELDS = {
    "num_experts": "num_experts",
    "moe_router_topk": "top_k",
    "moe_router_score_function": "score_function",
    "moe_router_pre_softmax": "pre_softmax",
    "moe_router_num_groups": "num_groups",
    "moe_router_group_topk": "group_topk",
    "moe_router_topk_scaling_factor": "scaling_factor",
    "moe_z_loss_coeff": "z_loss_coeff",
    "moe_router_enable_expert_bias": "expert_bias",
    "moe_router_bias_update_rate": "bias_update_rate",
    "moe_apply_probs_on_input": "probs_on_input",
    "moe_expert_capacity_factor": "capacity_factor",
}


def read_router(args: object | None) -> Router | None:
    """The router that Megatron's arguments describe; None without arguments or without experts."""
    if not getattr(args, "num_experts", None):
        return None
    given = {name: value for name, value in vars(args).items() if value is not None}
    fields = {field: given[name] for name, field in _FIELDS.items() if name in given}
    if "moe_router_load_balancing_type" in given:
        types = given["moe_router_load_balancing_type"]
        fields["balancing"] = (types,) if isinstance(types, str) else tuple(types)
    coefficients = given.get("moe_aux_loss_coeff", 0.0)
    fields["aux_loss"] = any(coefficients if isinstance(coefficients, list) else [coefficients])
    in_half = bool(given.get("bf16") or given.get("fp16"))
    return Router(**fields, half_precision=in_half and "moe_router_dtype" not in given)


@dataclass(frozen=True)
class Note:
    """Something to know before training.

    Attributes:
        severity: `warning` for what the user should decide, `note` for what was done.
        argument: Megatron's argument that it is about; one who gives it has decided.
        text: one line.
    """

    severity: Severity
    argument: str
    text: str


@dataclass(frozen=True)
class RouterGrowth:
    """What becomes of the router.

    Attributes:
        order: where clones stand.
        arguments: Megatron arguments that take another value, beside experts and top-k.
        notes: what to know.
    """

    order: ExpertOrder
    arguments: tuple[tuple[str, int | float], ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Case:
    """A router and how it grows; what the rows of the tables look at."""

    router: Router
    m: int
    order: ExpertOrder
    top_k: TopKMode
    parked: bool = False

    @property
    def k(self) -> int:
        return self.router.top_k

    @property
    def g(self) -> int:
        return self.router.group_topk or 1

    @property
    def capacity(self) -> float:
        return self.router.capacity_factor or 0.0

    @property
    def scales(self) -> bool:
        return self.top_k == "scale"

    @property
    def keeps_active(self) -> bool:
        """Top-k stays and clones take tokens: what changes the function."""
        return not self.scales and not self.parked


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
        lambda c: c.scales and c.order == "interleave" and not _groups_stay(c),
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
            f"that the base logged ({_even_z_loss(c):.3g} were all logits 0)"
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
            f"{_first_use(c):.0f} steps, most by {2 * _first_use(c):.0f} (more where the biases of "
            "a layer are far apart)"
        ),
    ),
)


def apply(
    router: Router,
    m: int,
    *,
    order: OrderAsked = "auto",
    top_k: TopKMode = "scale",
    parked: bool = False,
) -> RouterGrowth:
    """Grow a router.

    Args:
        router: the base's.
        m: clones of each expert, the original counted.
        order: where clones stand; `auto` interleaves, to keep a token's destinations, unless groups
            forbid.
        top_k: `scale` multiplies top-k by m.
        parked: clones start with a bias that keeps every token from them; at a kept top-k.

    Raises:
        PlanError: the function would not be kept.
    """
    case = Case(router, m, "interleave" if order == "auto" else order, top_k, parked)
    if order == "auto" and case.scales and not _groups_stay(case):
        case = Case(router, m, "append", top_k)
    for rule in REFUSALS:
        if rule.when(case):
            raise PlanError(rule.text(case))
    rewrites = [row for row in REWRITES if row.when(case)]
    return RouterGrowth(
        case.order,
        tuple((row.argument, row.new(case)) for row in rewrites),
        (
            *(
                Note("warning", rule.argument, rule.text(case))
                for rule in WARNINGS
                if rule.when(case)
            ),
            *(Note("note", row.argument, _rewritten(row, case)) for row in rewrites),
            *(Note("note", rule.argument, rule.text(case)) for rule in NOTES if rule.when(case)),
        ),
    )


def _rewritten(row: Rewrite, case: Case) -> str:
    old = row.old(case.router)
    return (
        f"{row.argument} {'none' if old is None else f'{old:g}'} -> {row.new(case):g}: {row.reason}"
    )


def _groups_stay(case: Case) -> bool:
    """Whether interleaved clones leave a token its groups.

    A group's score is the sum of its best k // g experts. With m times the experts in as many
    groups it is that of the best m * k // g, all clones of the same experts if this is m * (k //
    g): m * (k mod g) < g.
    """
    router = case.router
    return (
        not router.is_grouped or case.g == router.num_groups or case.m * (case.k % case.g) < case.g
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


def _first_use(case: Case) -> float:
    """Steps until a parked clone can be selected.

    Score and bias of a clone are behind its original's by the spread of the biases and 2, and
    within a token's choice by up to the spread and 1; a step brings the two nearer by twice the
    rate.
    """
    return 1 / (2 * case.router.bias_update_rate)


def _even_z_loss(case: Case) -> float:
    """The coefficient that keeps the z-loss's gradient where all logits are 0, and L = ln E with
    them."""
    even = math.log(case.router.num_experts)
    return (case.router.z_loss_coeff or 0.0) * even / (even + math.log(case.m))
