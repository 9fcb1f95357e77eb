"""The router rules against Megatron's own router: random logits, cloned, routed, compared with the
base's.

`grow` does what growth at alpha = 0 does: it clones the logits' columns, multiplies top-k, and
applies the rules' rewrites. The function is kept if the weights of each expert's clones add up to
its weight.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist

from megatron_growth.errors import PlanError
from megatron_growth.planning import rules
from megatron_growth.planning.experts import ExpertMap
from megatron_growth.planning.pieces import PARKING_DISTANCE
from megatron_growth.planning.router import read_router
from megatron_growth.training import cpu_backend

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:megatron")

cpu_backend.install()  # while tests are collected: before any of them imports megatron

E = 12
SEQUENCE, BATCH = 72, 2
T = SEQUENCE * BATCH
DEVICE = "cpu" if cpu_backend.needed() else "cuda"

SIGMOID = {"moe_router_score_function": "sigmoid"}
SQRTSOFTPLUS = {"moe_router_score_function": "sqrtsoftplus"}
PRE_SOFTMAX = {"moe_router_pre_softmax": True}
BIAS = {**SIGMOID, "moe_router_enable_expert_bias": True}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn"}
QUANTILE = {"moe_router_load_balancing_type": "quantile_balancing"}


def _scaled(factor: float) -> dict[str, Any]:
    return {"moe_router_topk_scaling_factor": factor}


def _groups(num_groups: int, group_topk: int) -> dict[str, Any]:
    return {"moe_router_num_groups": num_groups, "moe_router_group_topk": group_topk}


def _aux(kind: Any, coefficient: Any = 0.1) -> dict[str, Any]:
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": coefficient}


def _capacity(policy: str, **more: Any) -> dict[str, Any]:
    return {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": policy, **more}


# k, options
KEPT: dict[str, tuple[int, dict[str, Any]]] = {
    "softmax after top-2": (2, {}),
    "softmax after top-3": (3, {}),
    "softmax before top-1": (1, PRE_SOFTMAX),
    "softmax before top-3": (3, PRE_SOFTMAX),
    "sigmoid, top-2": (2, SIGMOID),
    "sigmoid, top-5": (5, SIGMOID),
    "sqrtsoftplus, top-2": (2, SQRTSOFTPLUS),
    "every expert": (12, SIGMOID),
    "scaling factor, sigmoid": (3, {**SIGMOID, **_scaled(2.5)}),
    "scaling factor, softmax before": (1, {**PRE_SOFTMAX, **_scaled(2.5)}),
    "scaling factor, softmax after": (2, _scaled(2.5)),
    "expert bias, sigmoid": (3, BIAS),
    "expert bias, sqrtsoftplus": (2, {**BIAS, **SQRTSOFTPLUS}),
    "groups, k divisible by g": (4, {**SIGMOID, **_groups(4, 2)}),
    "groups, one each": (2, {**PRE_SOFTMAX, **_groups(3, 2)}),
    "groups, all of them": (5, _groups(4, 4)),
    "groups and expert bias": (4, {**BIAS, **_groups(4, 2)}),
    "aux loss": (2, _aux("aux_loss")),
    "aux loss, top-1": (1, {**PRE_SOFTMAX, **_aux("aux_loss")}),
    "aux loss, sigmoid": (3, {**SIGMOID, **_aux("aux_loss")}),
    "seq-aux loss": (2, _aux("seq_aux_loss")),
    "seq-aux loss, sqrtsoftplus": (2, {**SQRTSOFTPLUS, **_aux("seq_aux_loss")}),
    "global-aux loss": (2, _aux("global_aux_loss")),
    "three aux losses": (3, _aux(["aux_loss", "seq_aux_loss", "global_aux_loss"], [0.1, 0.2, 0.3])),
    "capacity, by probability": (2, _capacity("probs")),
    "capacity, by position": (2, {**SIGMOID, **_capacity("position")}),
    "capacity, padded": (
        3,
        {**PRE_SOFTMAX, **_capacity("probs", moe_pad_expert_input_to_capacity=True)},
    ),
    "quantile balancing": (2, QUANTILE),
    "quantile balancing, sigmoid": (3, {**SIGMOID, **QUANTILE}),
    "quantile balancing, top-1": (1, {**PRE_SOFTMAX, **QUANTILE}),
    "sinkhorn, top-2": (2, SINKHORN),
    "sinkhorn, which ignores scores and groups": (3, {**SIGMOID, **SINKHORN, **_groups(4, 2)}),
}

# Interleaved clones do not keep these, so `auto` must append.
UNLUCKY_GROUPS = {
    "top-3 of 2 groups": (3, {**SIGMOID, **_groups(4, 2)}),
    "top-5 of 3 groups": (5, {**PRE_SOFTMAX, **_groups(4, 3)}),
    "top-5 of 3 groups, expert bias": (5, {**BIAS, **_groups(4, 3)}),
}

# What the rules refuse at a scaled top-k -> words of the refusal.
REFUSED = {
    "sigmoid, top-1": (SIGMOID, "divides those of several by their sum"),
    "sqrtsoftplus, top-1": (SQRTSOFTPLUS, "divides those of several by their sum"),
    "sigmoid, top-1, expert bias": (BIAS, "divides those of several by their sum"),
    "sigmoid, top-1, quantile balancing": ({**SIGMOID, **QUANTILE}, "divides those of several"),
    "sinkhorn, top-1": (SINKHORN, "'sinkhorn' weighs one expert by sigmoid"),
}

# k = 1 and kept at 1.
KEPT_AT_TOP_1 = {
    "softmax before": PRE_SOFTMAX,
    "softmax before, scaled": {**PRE_SOFTMAX, **_scaled(2.5)},
    "softmax before, quantile balancing": {**PRE_SOFTMAX, **QUANTILE},
    "sigmoid": SIGMOID,
    "sqrtsoftplus": SQRTSOFTPLUS,
    "expert bias": BIAS,
    "groups": {**SIGMOID, **_groups(4, 1)},
    "sinkhorn": SINKHORN,
}


# k, options: with clones parked at a kept top-k.
PARKED: dict[str, tuple[int, dict[str, Any]]] = {
    "top-1": (1, BIAS),
    "top-4": (4, BIAS),
    "every expert": (12, BIAS),
    "groups": (4, {**BIAS, **_groups(4, 2)}),
    "groups, k not divisible by g": (5, {**BIAS, **_groups(4, 3)}),
    "groups, all of them": (5, {**BIAS, **_groups(4, 4)}),
    "scaling factor": (3, {**BIAS, **_scaled(2.5)}),
    "no other balancing": (3, {**BIAS, **_aux("none", 0.0)}),
    "capacity": (3, {**BIAS, **_capacity("probs")}),
}


@dataclass
class Routed:
    """What a router did.

    Attributes:
        weights: [tokens, experts], zero where a token does not go.
        map: whether it goes.
        gradient: of the weighted sum and all auxiliary losses, by logits.
        losses: as Megatron logs them, by name, without their coefficients.
        balance: the expert bias or qb_beta that the next step gets; None without.
    """

    weights: torch.Tensor
    map: torch.Tensor
    gradient: torch.Tensor
    losses: dict[str, float]
    balance: torch.Tensor | None


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed)).to(DEVICE)


def make_router(num_experts: int, top_k: int, options: dict[str, Any]) -> Any:
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        add_bias_linear=False,
        num_moe_experts=num_experts,
        moe_router_topk=top_k,
        moe_token_dispatcher_type="alltoall",
        **options,
    )
    group = dist.group.WORLD
    router = TopKRouter(config, SimpleNamespace(tp=group, cp=group, tp_cp=group, tp_dp_cp=group))
    router.set_layer_number(1)
    return router


def route(
    logits: torch.Tensor,
    top_k: int,
    options: dict[str, Any],
    *,
    cotangent: torch.Tensor,
    balance: torch.Tensor | None = None,
    training: bool = True,
) -> Routed:
    """Route with Megatron's router.

    Args:
        logits: [tokens, experts].
        cotangent: of the weights, [tokens, experts]: what each expert's output is worth.
        balance: the expert bias or qb_beta to begin with.
    """
    from megatron.core.transformer.moe.moe_logging import (
        destroy_moe_metrics_tracker,
        get_moe_metrics_tracker,
    )
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    destroy_moe_metrics_tracker()
    router = make_router(logits.shape[1], top_k, options).train(training)
    buffer = router.expert_bias if router.expert_bias is not None else router.qb_beta
    if buffer is not None and balance is not None:
        buffer.copy_(balance)
    given = logits.clone().requires_grad_()
    weights, routing_map = router.routing(given.view(SEQUENCE, BATCH, -1))
    (weights * cotangent).sum().backward()
    after = None
    if router.expert_bias is not None:
        tokens = routing_map.sum(0).float()
        after = get_updated_expert_bias(tokens, router.expert_bias, 1e-3, dist.group.WORLD)
    elif router.qb_beta is not None:
        after = router.qb_beta_accum.clone()
    metrics = get_moe_metrics_tracker()._metrics
    losses = {name: float(entry.values) for name, entry in metrics.items()}
    return Routed(weights.detach(), routing_map, given.grad, losses, after)


@dataclass
class Comparison:
    """A base and what it grew into, clones folded back onto their experts."""

    base: Routed
    grown: Routed
    experts: ExpertMap

    def fold(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the clones of each expert."""
        return torch.zeros_like(self.base.weights).index_add_(
            1, self.sources, values.to(self.base.weights)
        )

    def clone(self, values: torch.Tensor) -> torch.Tensor:
        return values[..., self.sources]

    @property
    def sources(self) -> torch.Tensor:
        return torch.tensor(
            [self.experts.source(e) for e in range(self.experts.num_target)], device=DEVICE
        )

    @property
    def difference(self) -> float:
        """Of the weights, the largest."""
        return float((self.fold(self.grown.weights) - self.base.weights).abs().max())


def grow(
    top_k: int,
    options: dict[str, Any],
    m: int,
    order: str,
    *,
    mode: str = "scale",
    arguments: dict[str, int] | None = None,
    parked: bool = False,
    noise: float = 0.0,
    lift: float = 0.0,
    spread: float = 0.3,
    training: bool = True,
    logits: torch.Tensor | None = None,
) -> Comparison:
    """Route the base and the model grown as the rules say.

    Args:
        arguments: that the grown model has instead of the base's, and `order` as it is; None for
            the rules'.
        parked: place the balancing bias of clones as growth does.
        noise: on the logits of clones.
        lift: added to the logits of clones.
        spread: of the balancing biases.
    """
    if arguments is None:
        made = growth(top_k, options, m, order, mode, parked)
        order, arguments = made.order, dict(made.arguments)
    experts, changed = ExpertMap(E, m, order), {**options, **arguments}  # type: ignore[arg-type]
    sources = [experts.source(e) for e in range(experts.num_target)]
    logits = random(T, E) * 2 if logits is None else logits
    cotangent, balance = random(T, E, seed=1), random(E, seed=2) * spread
    cloned, is_clone = balance[sources], [experts.clone_index(e) > 0 for e in range(m * E)]
    if parked:
        cloned[is_clone] -= float(balance.max() - balance.min()) + PARKING_DISTANCE
    grown_logits = logits[:, sources]
    grown_logits[:, is_clone] += lift + noise * random(T, (m - 1) * E, seed=3)
    base = route(logits, top_k, options, cotangent=cotangent, balance=balance, training=training)
    grown_k = top_k * m if mode == "scale" else top_k
    grown = route(
        grown_logits,
        grown_k,
        changed,
        cotangent=cotangent[:, sources],
        balance=cloned,
        training=training,
    )
    return Comparison(base, grown, experts)


def growth(
    top_k: int,
    options: dict[str, Any],
    m: int,
    order: str,
    mode: str = "scale",
    parked: bool = False,
) -> rules.RouterGrowth:
    router = read_router(Namespace(num_experts=E, moe_router_topk=top_k, **options))
    assert router is not None
    return rules.apply(router, m, order=order, top_k=mode, parked=parked)  # type: ignore[arg-type]


def assert_kept(compared: Comparison) -> None:
    """Weights, destinations, losses, gradients and balancing: the base's, split evenly over the
    clones."""
    base, grown, m = compared.base, compared.grown, compared.experts.factor
    assert base.map.any()
    assert base.gradient.abs().max() > 1e-4
    assert torch.equal(compared.clone(base.map), grown.map)
    torch.testing.assert_close(compared.fold(grown.weights), base.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        grown.gradient, compared.clone(base.gradient) / m, rtol=1e-4, atol=1e-6
    )
    assert grown.losses == pytest.approx(base.losses, rel=1e-5)
    if base.balance is not None:
        torch.testing.assert_close(
            grown.balance, compared.clone(base.balance), rtol=1e-5, atol=1e-6
        )


# -- top-k scaled


@pytest.mark.parametrize("order", ["interleave", "append"])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("row", KEPT)
def test_the_function_is_kept(row: str, m: int, order: str) -> None:
    top_k, options = KEPT[row]
    assert_kept(grow(top_k, options, m, order))


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("row", KEPT)
def test_auto_interleaves_where_that_keeps_the_function(row: str, m: int) -> None:
    assert growth(*KEPT[row], m, "auto").order == "interleave"


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("row", UNLUCKY_GROUPS)
def test_auto_appends_where_groups_need_it(row: str, m: int) -> None:
    top_k, options = UNLUCKY_GROUPS[row]
    assert growth(top_k, options, m, "auto").order == "append"
    assert_kept(grow(top_k, options, m, "auto"))
    assert grow(top_k, options, m, "interleave", arguments={}).difference > 0.05
    with pytest.raises(PlanError, match="order 'interleave' changes the groups"):
        growth(top_k, options, m, "interleave")


@pytest.mark.parametrize("m", [2, 3])
def test_appended_groups_must_be_multiplied(m: int) -> None:
    options = {**SIGMOID, **_groups(4, 2)}
    assert dict(growth(4, options, m, "append").arguments) == _groups(4 * m, 2 * m)
    assert grow(4, options, m, "append").difference < 1e-6
    assert grow(4, options, m, "append", arguments={}).difference > 0.05


def test_which_groups_interleaving_keeps_is_exactly_what_the_rule_says() -> None:
    """Over numbers of groups, groups used and experts taken; for k < g upstream scores no group at
    all."""
    seen = {True: 0, False: 0}
    for num_groups, m in product((2, 3, 4, 6), (2, 3, 4)):
        for g, k in product(range(1, num_groups + 1), range(1, 9)):
            if not g <= k <= g * E // num_groups:
                continue
            options = (
                {**SIGMOID, **_groups(num_groups, g)}
                if k > 1
                else {**PRE_SOFTMAX, **_groups(num_groups, g)}
            )
            try:
                growth(k, options, m, "interleave")
                said = True
            except PlanError:
                said = False
            base = _weights(random(256, E), k, options)
            grown = _weights(random(256, E).repeat_interleave(m, 1), m * k, options)
            kept = bool((grown.view(-1, E, m).sum(-1) - base).abs().max() < 1e-5)
            assert kept == said, (num_groups, g, k, m)
            seen[kept] += 1
    assert min(seen.values()) > 20


def _weights(logits: torch.Tensor, k: int, options: dict[str, Any]) -> torch.Tensor:
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    return topk_routing_with_score_function(
        logits,
        k,
        use_pre_softmax=options.get("moe_router_pre_softmax", False),
        num_groups=options.get("moe_router_num_groups"),
        group_topk=options.get("moe_router_group_topk"),
        score_function=options.get("moe_router_score_function", "softmax"),
    )[0]


@pytest.mark.parametrize("order", ["interleave", "append"])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("row", REFUSED)
def test_what_changes_the_function_is_refused(row: str, m: int, order: str) -> None:
    options, words = REFUSED[row]
    with pytest.raises(PlanError, match=words):
        growth(1, options, m, order)
    assert grow(1, options, m, order, arguments={}).difference > 0.05


@pytest.mark.parametrize("m", [2, 3])
def test_sinkhorn_keeps_the_function_in_evaluation_too(m: int) -> None:
    assert grow(2, SINKHORN, m, "interleave", training=False).difference < 1e-6
    assert grow(1, SINKHORN, m, "interleave", arguments={}, training=False).difference > 0.05


def test_softmax_after_top_1_would_be_kept_but_upstream_refuses_it() -> None:
    logits = random(T, E)
    folded = _weights(logits.repeat_interleave(3, 1), 3, {}).view(T, E, 3).sum(-1)
    torch.testing.assert_close(folded, _weights(logits, 1, {}))
    with pytest.raises(ValueError, match="pre-softmax when topk is 1"):
        make_router(E, 1, {})


# -- z-loss


@pytest.mark.parametrize("order", ["interleave", "append"])
@pytest.mark.parametrize("m", [2, 3])
def test_the_z_loss_changes_by_ln_m_and_the_output_does_not(m: int, order: str) -> None:
    logits = random(T, E) * 2
    compared = grow(2, {"moe_z_loss_coeff": 0.1}, m, order, logits=logits)
    assert compared.difference < 1e-6
    lse = torch.logsumexp(logits, -1)
    assert compared.base.losses["z_loss"] == pytest.approx(float(lse.square().mean()), rel=1e-5)
    shifted = float((lse + math.log(m)).square().mean())
    assert compared.grown.losses["z_loss"] == pytest.approx(shifted, rel=1e-5)
    assert shifted > 1.2 * compared.base.losses["z_loss"]
    assert (compared.fold(compared.grown.gradient) - compared.base.gradient).abs().max() > 1e-5


@pytest.mark.parametrize("m", [2, 3])
def test_the_advised_coefficient_keeps_the_z_losss_pull(m: int) -> None:
    """Exactly where logits are 0, the number it gives; nearly with L from the log, the formula it
    gives."""
    from megatron.core.transformer.moe.moe_utils import z_loss_func

    def pull(logits: torch.Tensor, coefficient: float) -> torch.Tensor:
        logits = logits.clone().requires_grad_()
        z_loss_func(logits, coefficient).backward()
        return logits.grad

    (note,) = growth(2, {"moe_z_loss_coeff": 0.1}, m, "auto").notes
    advised = 0.1 * math.log(E) / (math.log(E) + math.log(m))
    assert (note.severity, note.argument) == ("warning", "moe_z_loss_coeff")
    assert f"{advised:.3g} were all logits 0" in note.text

    zero = torch.zeros(T, E)
    wanted = pull(zero, 0.1).repeat_interleave(m, 1) / m
    torch.testing.assert_close(pull(zero.repeat_interleave(m, 1), advised), wanted)
    logits = random(T, E).cpu()
    root = float(z_loss_func(logits, 1.0).sqrt())
    wanted = pull(logits, 0.1)
    near, unchanged = (
        (pull(logits.repeat_interleave(m, 1), c).view(T, E, m).sum(-1) - wanted).norm()
        / wanted.norm()
        for c in (0.1 * root / (root + math.log(m)), 0.1)
    )
    assert near < 0.06
    assert unchanged > 0.2


# -- 16 bits


def test_a_16_bit_router_keeps_the_function_up_to_ties() -> None:
    logits = random(4096, 64)

    def changed(logits: torch.Tensor) -> float:
        base, grown = _weights(logits, 8, {}), _weights(logits.repeat_interleave(2, 1), 16, {})
        return float(
            ((grown > 0).view(-1, 64, 2) != (base > 0).unsqueeze(-1)).any(-1).any(-1).float().mean()
        )

    assert changed(logits) == 0
    assert 0.005 < changed(logits.bfloat16()) < 0.1


# -- top-k kept


@pytest.mark.parametrize("order", ["interleave", "append"])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("row", KEPT_AT_TOP_1)
def test_top_1_kept_keeps_the_function(row: str, m: int, order: str) -> None:
    compared = grow(1, KEPT_AT_TOP_1[row], m, order, mode="keep")
    assert compared.difference < 1e-6
    assert torch.equal(compared.fold(compared.grown.map) > 0, compared.base.map)


@pytest.mark.parametrize("m", [2, 3])
def test_softmax_before_a_kept_top_1_needs_the_scaling_factor(m: int) -> None:
    assert dict(growth(1, PRE_SOFTMAX, m, "auto", "keep").arguments) == {
        "moe_router_topk_scaling_factor": m
    }
    compared = grow(1, PRE_SOFTMAX, m, "interleave", mode="keep", arguments={})
    torch.testing.assert_close(compared.fold(compared.grown.weights) * m, compared.base.weights)


@pytest.mark.parametrize("order", ["interleave", "append"])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize(
    "options", [{}, PRE_SOFTMAX, SIGMOID, BIAS], ids=["after", "before", "sigmoid", "bias"]
)
def test_more_than_top_1_kept_takes_clones_of_fewer_experts(
    options: dict[str, Any], m: int, order: str
) -> None:
    compared = grow(4, options, m, order, mode="keep")
    used = (compared.fold(compared.grown.map) > 0).sum(-1)
    assert set(used.tolist()) == {math.ceil(4 / m)}
    assert compared.difference > 0.05
    assert any(
        "another function" in note.text for note in growth(4, options, m, order, "keep").notes
    )


# -- top-k kept, clones parked


@pytest.mark.parametrize("order", ["interleave", "append"])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("row", PARKED)
def test_parked_clones_keep_the_function_at_any_noise(row: str, m: int, order: str) -> None:
    """To the bit: originals have the base's weights and gradients, clones have none of either."""
    top_k, options = PARKED[row]
    compared = grow(top_k, options, m, order, mode="keep", parked=True, noise=3.0)
    base, grown, experts = compared.base, compared.grown, compared.experts
    originals = [experts.targets(expert)[0] for expert in range(E)]
    clones = sorted(set(range(m * E)) - set(originals))
    assert base.map.any()
    assert base.gradient.abs().max() > 1e-4
    assert torch.equal(grown.weights[:, originals], base.weights)
    assert torch.equal(grown.map[:, originals], base.map)
    torch.testing.assert_close(grown.gradient[:, originals], base.gradient)
    for values in (grown.weights, grown.map, grown.gradient):
        assert not values[:, clones].any()


@pytest.mark.parametrize("m", [2, 3])
def test_parking_nearer_than_scores_differ_would_not_hold(m: int) -> None:
    logits = random(T, E) * 8  # scores of nearly 0 and nearly 1
    far = grow(4, BIAS, m, "interleave", mode="keep", parked=True, logits=logits)
    assert far.difference == 0
    near = grow(4, BIAS, m, "interleave", mode="keep", logits=logits)
    assert near.difference > 0.05


def test_scores_that_are_as_far_apart_as_can_be_do_not_bring_a_clone_in() -> None:
    logits = torch.full((T, E), -200.0, device=DEVICE)  # sigmoid is 0 in fp32, and 1 for clones
    compared = grow(
        4, BIAS, 2, "interleave", mode="keep", parked=True, spread=0.0, logits=logits, lift=400.0
    )
    assert float(compared.grown.weights[:, 1::2].abs().max()) == 0
    assert not compared.grown.map[:, 1::2].any()
    assert compared.grown.map.any()


@pytest.mark.parametrize("order", ["interleave", "append"])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_parked_clones_leave_originals_their_capacity(policy: str, m: int, order: str) -> None:
    options = {**BIAS, **_capacity(policy)}
    dropped = grow(3, options, m, order, mode="keep", parked=True, arguments={})
    assert dropped.difference > 0.05
    compared = grow(3, options, m, order, mode="keep", parked=True, noise=1.0)
    assert compared.difference == 0
    assert compared.base.map.sum() < 3 * T  # some were dropped


def test_losses_see_parked_clones_and_the_rules_say_so() -> None:
    options = {**BIAS, **_aux("seq_aux_loss"), "moe_z_loss_coeff": 0.1}
    compared = grow(4, options, 2, "interleave", mode="keep", parked=True)
    assert compared.difference == 0
    assert len(compared.base.losses) == 2
    for name, value in compared.base.losses.items():
        assert abs(compared.grown.losses[name] / value - 1) > 1e-3, name
    assert compared.grown.gradient[:, 1::2].abs().max() > 1e-5  # of clones
    said = {note.argument for note in growth(4, options, 2, "auto", "keep", True).notes}
    assert said >= {"moe_aux_loss_coeff", "moe_z_loss_coeff"}


@pytest.mark.parametrize("groups", [{}, _groups(4, 2)], ids=["no groups", "groups"])
def test_clones_come_into_use_when_the_rules_say(groups: dict[str, Any]) -> None:
    """Megatron's balancing, step by step on the same tokens, at a rate that makes it short."""
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    rate, options = 0.02, {**BIAS, **groups, "moe_router_bias_update_rate": 0.02}
    note = growth(4, options, 2, "auto", "keep", True).notes[-1]
    assert "after some 25 steps, most by 50 " in note.text
    logits = (random(T, E) * 2).repeat_interleave(2, 1)
    logits[:, 1::2] += 0.02 * random(T, E, seed=3)
    router = make_router(2 * E, 4, options).train()
    router.expert_bias[1::2] -= PARKING_DISTANCE
    used = []
    for _ in range(60):
        routing_map = router.routing(logits.view(SEQUENCE, BATCH, -1))[1]
        used.append(int((routing_map.sum(0)[1::2] > 0).sum()))
        tokens = routing_map.sum(0).float()
        router.expert_bias.copy_(
            get_updated_expert_bias(tokens, router.expert_bias, rate, dist.group.WORLD)
        )
    first = next(step for step, clones in enumerate(used) if clones)
    assert 25 <= first < 50
    assert used[52] > E / 2


@pytest.mark.parametrize(
    ("top_k", "options", "order", "words"),
    [
        (4, SIGMOID, "auto", "without moe_router_enable_expert_bias"),
        (4, {**BIAS, **SQRTSOFTPLUS}, "auto", "scores without an upper bound"),
        (4, {**BIAS, **SINKHORN}, "auto", "with moe_router_load_balancing_type 'sinkhorn'"),
        (1, {**BIAS, **_groups(4, 2)}, "append", "scored by their best 1 // 2 = 0 experts"),
    ],
)
def test_what_cannot_be_parked_is_refused(
    top_k: int, options: dict[str, Any], order: str, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        growth(top_k, options, 2, order, "keep", True)


def test_scores_without_a_bound_would_bring_parked_clones_in() -> None:
    logits = random(T, E) * 20
    options = {**BIAS, **SQRTSOFTPLUS}
    compared = grow(
        4, options, 2, "interleave", mode="keep", parked=True, arguments={}, logits=logits
    )
    assert compared.difference > 0.05


# -- top-k kept, and what else it changes


def test_a_kept_top_k_and_the_base_s_capacity_drop_tokens() -> None:
    options = {**SIGMOID, "moe_expert_capacity_factor": 2.0}
    assert grow(1, options, 2, "interleave", mode="keep").difference > 0.05
    notes = growth(1, options, 2, "auto", "keep").notes
    assert any("4 drops no more" in note.text for note in notes)


def test_quantile_balancing_at_a_kept_top_k_stops_on_an_uneven_batch() -> None:
    logits = random(T, 60)  # 144 * 2 / 60 is no integer
    with pytest.raises(AssertionError, match="divisible by"):
        route(logits, 2, QUANTILE, cotangent=logits)
    assert any("divisible" in note.text for note in growth(2, QUANTILE, 5, "auto", "keep").notes)


# -- the whole layer: what stands around the router


@pytest.fixture(scope="module")
def parallel(process_group: None) -> Iterator[None]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()


def make_layer(num_experts: int, top_k: int, options: dict[str, Any]) -> Any:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        ffn_hidden_size=8,
        moe_ffn_hidden_size=8,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        init_method_std=0.5,
        num_moe_experts=num_experts,
        moe_router_topk=top_k,
        moe_token_dispatcher_type="alltoall",
        **options,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False)
    layer = spec(config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    layer.set_layer_number(1)
    return layer.to(DEVICE)


def grown_layer(base: Any, top_k: int, options: dict[str, Any], experts: ExpertMap) -> Any:
    layer = make_layer(experts.num_target, top_k, options)
    sources = [experts.source(e) for e in range(experts.num_target)]
    of_base = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("router."):
                parameter.copy_(of_base[name][sources])
                continue
            head, separator, tail = name.partition("local_experts.")
            if separator:
                expert, _, rest = tail.partition(".")
                name = f"{head}{separator}{sources[int(expert)]}.{rest}"
            parameter.copy_(of_base[name])
    return layer


SHARED = {
    "moe_shared_expert_intermediate_size": 8,
    "moe_shared_expert_gate": True,
    "add_bias_linear": False,
}
LAYERS = {
    "shared experts with a gate": (2, SIGMOID | SHARED, "scale", "interleave"),
    "expert biases": (2, {"add_bias_linear": True}, "scale", "append"),
    "weights on the input, top-1 kept": (
        1,
        SIGMOID | {"moe_apply_probs_on_input": True, "add_bias_linear": False},
        "keep",
        "interleave",
    ),
}


@pytest.mark.parametrize("row", LAYERS)
def test_the_whole_layer_keeps_its_output(row: str, parallel: None) -> None:
    top_k, options, mode, order = LAYERS[row]
    made = rules.apply(
        read_router(Namespace(num_experts=4, moe_router_topk=top_k, **options)),
        2,
        order=order,
        top_k=mode,
    )
    base = make_layer(4, top_k, options)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    grown = grown_layer(
        base, top_k * (2 if mode == "scale" else 1), options, ExpertMap(4, 2, made.order)
    )
    hidden = random(SEQUENCE, BATCH, 16)
    with torch.no_grad():
        wanted, got = (layer(hidden)[0] for layer in (base, grown))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_weights_on_the_input_work_with_top_1_alone(parallel: None) -> None:
    options = SIGMOID | {"moe_apply_probs_on_input": True, "add_bias_linear": False}
    with pytest.raises(PlanError, match="moe_apply_probs_on_input works with top-1 alone"):
        growth(1, options, 2, "auto")
    with pytest.raises(AssertionError, match="only works with `moe_router_topk`=1"):
        make_layer(2, 2, options)(random(SEQUENCE, BATCH, 16))
