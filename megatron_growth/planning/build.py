"""From what the user asked and what the base is, to a plan; everything that cannot work is refused
here."""

from typing import TYPE_CHECKING

from megatron_growth.errors import PlanError
from megatron_growth.planning import layers, rules
from megatron_growth.planning.experts import ExpertMap, ExpertOrder
from megatron_growth.planning.keys import KeyForm
from megatron_growth.planning.layers import LayerMap
from megatron_growth.planning.plan import Architecture, GrowthPlan, NoiseScale
from megatron_growth.planning.router import Router

if TYPE_CHECKING:
    from megatron_growth.config import DepthConfig, GrowthConfig, WidthConfig


def build_plan(
    growth: "GrowthConfig",
    source: Architecture,
    *,
    masters: str | None = None,
    target_form: KeyForm | None = None,
    router: Router | None = None,
) -> GrowthPlan:
    """Derive the plan.

    Args:
        growth: what the user asked for.
        source: what the base checkpoint is.
        masters: optimizer state of the base that holds fp32 masters, None where there is none.
        target_form: key form of the grown model; the source's by default.
        router: the base's router; None where its arguments are not known, so that no rule is
            applied.

    Raises:
        PlanError: the base cannot grow that way.
    """
    layer_map = _layer_map(growth.depth, source.num_layers)
    grown = router_growth(growth, source, router)
    expert_map = _expert_map(growth.width, source, grown)
    target = Architecture(
        num_layers=layer_map.num_target,
        num_experts=expert_map.num_target,
        top_k=_top_k(growth.width, source),
        key_form=target_form or source.key_form,
    )
    noise = growth.width.noise if growth.width else None
    return GrowthPlan(
        source=source,
        target=target,
        layers=layer_map,
        experts=expert_map,
        zero_output=growth.depth is not None and growth.depth.new_layer_init == "zero_output",
        noise=NoiseScale(noise.experts, noise.router) if noise else NoiseScale(0.0, 0.0),
        optimizer=growth.optimizer,
        masters=None if growth.optimizer == "reset" else masters,
        seed=growth.seed,
        arguments=grown.arguments if grown else (),
        parked=growth.width is not None and growth.width.clones == "parked",
    )


def router_growth(
    growth: "GrowthConfig", source: Architecture, router: Router | None
) -> rules.RouterGrowth | None:
    """What the rules make of the base's router; None where experts do not grow or the router is not
    known."""
    if growth.width is None or router is None or source.num_experts == 0:
        return None
    width = growth.width
    return rules.apply(
        router,
        width.factor,
        order=width.order,
        top_k=width.top_k,
        parked=width.clones == "parked",
    )


def _layer_map(depth: "DepthConfig | None", num_layers: int) -> LayerMap:
    if depth is None:
        return layers.identity(num_layers)
    if depth.method == "map":
        assert depth.map is not None
        return layers.explicit(num_layers, depth.map)
    make = layers.interposition if depth.method == "interposition" else layers.stacking
    skipped = depth.skip_first + depth.skip_last
    grown = max(num_layers - skipped, 0)
    target = depth.target_layers or grown * (depth.factor or 2) + skipped
    return make(num_layers, target=target, skip_first=depth.skip_first, skip_last=depth.skip_last)


def _expert_map(
    width: "WidthConfig | None", source: Architecture, router: rules.RouterGrowth | None
) -> ExpertMap:
    if width is None:
        return ExpertMap(source.num_experts, 1, "interleave")
    if source.num_experts == 0:
        raise PlanError(
            f"width.factor ({width.factor}) needs experts to clone, but the base is a dense model; "
            "leave `width` out or start from a Mixture-of-Experts base"
        )
    if width.clones == "parked" and router is None:
        raise PlanError(
            "clones 'parked' need a router with an expert_bias, and the base holds no Megatron "
            "arguments that say so; use `clones: active`"
        )
    order: ExpertOrder = "append" if width.order == "append" else "interleave"
    return ExpertMap(source.num_experts, width.factor, router.order if router else order)


def _top_k(width: "WidthConfig | None", source: Architecture) -> int | None:
    if source.top_k is not None and source.top_k > source.num_experts:
        raise PlanError(
            f"moe_router_topk ({source.top_k}) must not be above num_experts "
            f"({source.num_experts}); the checkpoint's arguments are not those of a model that ran"
        )
    if width is None or source.top_k is None or width.top_k == "keep":
        return source.top_k
    return source.top_k * width.factor
