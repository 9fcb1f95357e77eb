"""What a growth plan will do to a base: the content of `megatron-growth plan`. No weight is
read."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from megatron_growth.checkpoint.common_state import architecture_changes
from megatron_growth.checkpoint.noise import STREAM_VERSION
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.config import GrowthConfig
from megatron_growth.planning.build import router_growth
from megatron_growth.planning.cost import (
    ParameterCount,
    Road,
    count_parameters,
    grown_tensors,
    roads,
)
from megatron_growth.planning.experts import ExpertMap
from megatron_growth.planning.layers import LayerMap
from megatron_growth.planning.plan import GrowthPlan
from megatron_growth.planning.router import read_router
from megatron_growth.report.inspection import counted, iteration_of, stored

Value = int | float | str | None

# Megatron argument -> what a person calls it. The first three are the plan's, for a base without
# arguments.
ARCHITECTURE = {
    "num_layers": "layers",
    "num_experts": "experts",
    "moe_router_topk": "top-k",
    "hidden_size": "hidden size",
    "ffn_hidden_size": "dense FFN size",
    "moe_ffn_hidden_size": "expert FFN size",
    "moe_shared_expert_intermediate_size": "shared expert FFN size",
    "moe_latent_size": "latent size",
    "num_attention_heads": "attention heads",
    "num_query_groups": "query groups",
    "kv_channels": "head size",
    "moe_layer_freq": "MoE layer frequency",
    "mtp_num_layers": "MTP layers",
    "padded_vocab_size": "vocabulary, padded",
    "seq_length": "sequence length",
    "params_dtype": "parameter type",
}


@dataclass(frozen=True)
class Row:
    """A Megatron argument of source and target."""

    argument: str
    source: Value
    target: Value


@dataclass(frozen=True)
class GrowthReport:
    """Everything `megatron-growth plan` says.

    Attributes:
        checkpoint: the base's `iter_*` directory.
        iteration: of the base, None where it does not say.
        plan: the growth.
        architecture: source and target side by side.
        source: parameters of the base.
        target: parameters of the grown model.
        roads: bytes that each way of growing moves.
        arguments: Megatron's command line for the target; None where the base has no arguments.
        warnings: what the user should know before training.
    """

    checkpoint: str
    iteration: int | None
    plan: GrowthPlan
    architecture: tuple[Row, ...]
    source: ParameterCount
    target: ParameterCount
    roads: tuple[Road, ...]
    arguments: tuple[str, ...] | None
    warnings: tuple[str, ...]
    stream_version: int = STREAM_VERSION

    def document(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        plan = self.plan
        experts = range(plan.experts.num_target)
        return {
            "checkpoint": self.checkpoint,
            "iteration": self.iteration,
            "fingerprint": plan.fingerprint,
            "seed": plan.seed,
            "noise": {**asdict(plan.noise), "stream_version": self.stream_version},
            "optimizer": plan.optimizer,
            "architecture": {
                row.argument: {"source": row.source, "target": row.target}
                for row in self.architecture
            },
            "layer_map": list(plan.layers.sources),
            "expert_map": [
                {"source": plan.experts.source(e), "clone": plan.experts.clone_index(e)}
                for e in experts
            ],
            "parameters": {"source": counted(self.source), "target": counted(self.target)},
            "roads": [asdict(road) for road in self.roads],
            "arguments": None if self.arguments is None else list(self.arguments),
            "warnings": list(self.warnings),
            "plan": json.loads(plan.to_json()),
        }


def growth_report(
    source: SourceCheckpoint,
    growth: GrowthConfig,
    plan: GrowthPlan,
    arguments: Sequence[str] | None,
) -> GrowthReport:
    """Gather the report.

    Args:
        source: the base.
        growth: what the user asked for.
        plan: made of the two.
        arguments: Megatron's command line for the target, None where the base has no arguments.
    """
    base = stored(source.tensors)
    return GrowthReport(
        checkpoint=str(source.directory),
        iteration=iteration_of(source),
        plan=plan,
        architecture=tuple(_architecture(source, plan)),
        source=count_parameters(base, plan.source),
        target=count_parameters(grown_tensors(plan, base), plan.target),
        roads=roads(plan, base),
        arguments=None if arguments is None else tuple(arguments),
        warnings=tuple(_warnings(source, growth, plan)),
    )


# -- maps, so that a person can read them


def describe_layers(layers: LayerMap) -> str:
    """`0-1, 2-25 each x2, 26-27`: the source layers in the order of the target's."""
    runs = [(source, len(list(copies))) for source, copies in groupby(layers.sources)]
    spans: list[list[int]] = []  # first, last, copies of each
    for source, copies in runs:
        if spans and spans[-1][1] + 1 == source and spans[-1][2] == copies:
            spans[-1][1] = source
        else:
            spans.append([source, source, copies])
    return ", ".join(_span(*span) for span in spans)


def _span(first: int, last: int, copies: int) -> str:
    if first == last:
        return f"{first}" if copies == 1 else f"{first} x{copies}"
    return f"{first}-{last}" if copies == 1 else f"{first}-{last} each x{copies}"


def describe_experts(experts: ExpertMap, limit: int = 8) -> str:
    """`e0 e0' e1 e1' ...`: the first target experts by their source, one ' for each clone index."""
    shown = min(limit, experts.num_target)
    names = [f"e{experts.source(e)}" + "'" * experts.clone_index(e) for e in range(shown)]
    return " ".join(names) + (" ..." if shown < experts.num_target else "")


# -- rows and warnings


def _architecture(source: SourceCheckpoint, plan: GrowthPlan) -> Iterator[Row]:
    args = vars(source.args) if source.args is not None else {}
    changes = architecture_changes(source.args, plan) if source.args is not None else {}
    old, new = plan.source, plan.target
    certain = {
        "num_layers": (old.num_layers, new.num_layers),
        "num_experts": (old.num_experts or None, new.num_experts or None),
        "moe_router_topk": (old.top_k, new.top_k),
    }
    for name in ARCHITECTURE:
        before, after = certain.get(name) or (args.get(name), changes.get(name, args.get(name)))
        if (before, after) != (None, None):
            yield Row(name, _plain(before), _plain(after))


def _plain(value: Any) -> Value:
    """Lists as Megatron's command line writes them, `[0]*2+[1]*6`; types by name."""
    if isinstance(value, list | tuple):
        return "+".join(f"[{entry}]*{len(list(run))}" for entry, run in groupby(value))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if value is None or isinstance(value, int | float) else str(value)


def _warnings(source: SourceCheckpoint, growth: GrowthConfig, plan: GrowthPlan) -> Iterator[str]:
    yield from _depth_warnings(source, growth, plan)
    yield from _width_warnings(source, growth, plan)
    if not source.optimizer_states and plan.optimizer != "reset":
        yield (
            f"optimizer: {plan.optimizer}, but the base holds no optimizer state: training will "
            "refuse it; say `optimizer: reset`"
        )
    if source.args is None:
        yield "the base holds no Megatron arguments: training will refuse it"
    if source.undescribed:
        yield source.undescribed


def _depth_warnings(
    source: SourceCheckpoint, growth: GrowthConfig, plan: GrowthPlan
) -> Iterator[str]:
    if growth.depth is None:
        return
    if growth.depth.method == "stacking":
        yield (
            "stacking is the paper's baseline: it breaks the profile of weight scales at each "
            "seam; `method: interposition` keeps it"
        )
    skipped = growth.depth.skip_first, growth.depth.skip_last
    if any(skipped):
        yield f"the first {skipped[0]} and the last {skipped[1]} layers stay single"
    grown = plan.layers.targets[skipped[0] : plan.layers.num_source - skipped[1]]
    copies = sorted({len(targets) for targets in grown})
    if len(copies) > 1 and growth.depth.method != "map":
        yield f"layers get between {copies[0]} and {copies[-1]} copies, spread evenly"
    if any(tensor.key.place == "mtp" for tensor in source.tensors.values()):
        yield "multi-token-prediction layers are not grown in depth"
    if getattr(source.args, "pipeline_model_parallel_layout", None) is not None:
        yield "the base's pipeline layout is dropped, it names its own layers; give the target's"


def _width_warnings(
    source: SourceCheckpoint, growth: GrowthConfig, plan: GrowthPlan
) -> Iterator[str]:
    if growth.width is None:
        return
    router = router_growth(growth, plan.source, read_router(source.args))
    yield from (note.text for note in (router.notes if router else ()))
    if router is None and growth.width.top_k == "keep":
        yield "top_k: keep is another function unless top-k is 1; `top_k: scale` keeps it"
    if plan.source.top_k is None:
        yield "top-k of the base is not known: activated parameters cannot be counted"
    alphas = plan.noise.experts, plan.noise.router
    if alphas == (0.0, 0.0):
        yield "no noise: clones stay alike for long; the paper found alpha 0 one point worse"
    elif plan.masters is None and torch.bfloat16 in _weight_dtypes(source):
        yield "noise is added to bf16 weights, without fp32 masters: rounding swallows part of it"


def _weight_dtypes(source: SourceCheckpoint) -> set[torch.dtype]:
    return {t.metadata.properties.dtype for t in source.tensors.values() if t.key.state is None}
