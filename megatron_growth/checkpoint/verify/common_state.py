"""The common state: its arguments describe the grown model, and Adam is at the base's step."""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from megatron_growth.checkpoint.source import COMMON_OBJECT
from megatron_growth.checkpoint.verify.problem import Problem
from megatron_growth.planning.patterns import PATTERN_ARGUMENTS, written_out
from megatron_growth.planning.plan import GrowthPlan

# What growth leaves as it is, of the arguments that shape a model. A run's other arguments are its
# own.
_SHAPE_ARGUMENTS = (
    "hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "moe_latent_size", "num_attention_heads", "num_query_groups", "kv_channels", "mtp_num_layers",
    "padded_vocab_size", "moe_router_pre_softmax", "moe_router_score_function",
)  # fmt: skip


def check_common_state(
    plan: GrowthPlan,
    base: Mapping[str, Any] | None,
    grown: Mapping[str, Any] | None,
    report: Callable[[Problem], None],
) -> None:
    """The grown model's arguments describe it, and Adam is at the base's step."""
    if base is None:
        return
    if grown is None:
        report(Problem(COMMON_OBJECT, "is missing: the grown checkpoint has no common state"))
        return
    before, after = base.get("args"), grown.get("args")
    if before is not None and after is None:
        report(Problem(COMMON_OBJECT, "has no args"))
    elif before is not None and after is not None:
        for what in _wrong_arguments(plan, before, after):
            report(Problem(COMMON_OBJECT, what))
    for what in _wrong_optimizer(plan, base.get("optimizer"), grown.get("optimizer")):
        report(Problem(COMMON_OBJECT, what))


def _wrong_arguments(plan: GrowthPlan, base: Namespace, grown: Namespace) -> Iterator[str]:
    wanted: dict[str, Any] = {name: getattr(base, name, None) for name in _SHAPE_ARGUMENTS}
    num_layers = len(plan.layers.sources)
    wanted["num_layers"] = num_layers
    if getattr(base, "encoder_num_layers", None) is not None:
        wanted["encoder_num_layers"] = num_layers
    wanted.update(plan.arguments)
    wanted["num_experts"] = plan.experts.num_target or None
    if plan.experts.num_target:
        wanted["moe_router_topk"] = plan.target.top_k
    else:
        wanted["moe_router_topk"] = getattr(base, "moe_router_topk", None)
    for name, value in wanted.items():
        if (found := getattr(grown, name, None)) != value:
            yield f"args.{name} is {found!r}, not {value!r}"
    for name in PATTERN_ARGUMENTS:
        entries = written_out(name, getattr(base, name, None), plan.layers.num_source)
        pattern = entries and [entries[source] for source in plan.layers.sources]
        if (found := written_out(name, getattr(grown, name, None), num_layers)) != pattern:
            yield f"args.{name} says {found!r} of the layers, not {pattern!r}"
    layout = getattr(base, "pipeline_model_parallel_layout", None)
    same = getattr(grown, "pipeline_model_parallel_layout", None) == layout
    if layout is not None and same and num_layers > plan.layers.num_source:
        layers = plan.layers.num_source
        yield f"args.pipeline_model_parallel_layout names the base's {layers} layers"


def _wrong_optimizer(plan: GrowthPlan, base: Any, grown: Any) -> Iterator[str]:
    if plan.optimizer == "reset":
        if grown is not None:
            yield "has optimizer state, which the plan resets"
    elif base is not None and grown is None:
        yield "has no optimizer state, which the plan keeps"
    elif base is not None and (before := set(_steps(base))) != (after := set(_steps(grown))):
        yield f"has Adam at step {sorted(after)}, not {sorted(before)}"


def _steps(state: Any) -> Iterable[int]:
    """Every step in an optimizer's common state, `step` of its groups or `common_step`."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            if key in ("step", "common_step") and value is not None:
                yield int(value)
            else:
                yield from _steps(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _steps(value)
