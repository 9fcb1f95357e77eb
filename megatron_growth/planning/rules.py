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

from dataclasses import dataclass
from typing import Literal

from megatron_growth.errors import PlanError
from megatron_growth.planning.experts import ExpertOrder
from megatron_growth.planning.router import Router
from megatron_growth.planning.router_case import Case, TopKMode
from megatron_growth.planning.router_tables import NOTES, REFUSALS, REWRITES, WARNINGS, Rewrite

OrderAsked = Literal["auto", "interleave", "append"]
Severity = Literal["warning", "note"]


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
    if order == "auto" and case.scales and not case.groups_stay:
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
