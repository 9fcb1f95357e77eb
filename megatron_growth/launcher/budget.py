"""What an experiment costs and whether it fits, stage by stage, before anything runs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_growth.geometry import Geometry, Value
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.options import named
from megatron_growth.launcher.render import BYTES_OF_A_PARAMETER
from megatron_growth.planning.cost import FLOPS_PER_PARAMETER_AND_TOKEN, count_parameters
from megatron_growth.planning.inventory import architecture, tensors
from megatron_growth.planning.memory import (
    BUFFERS,
    Memory,
    Sharding,
    all_to_all_bytes,
    memory,
)


@dataclass(frozen=True)
class StageBudget:
    """One stage.

    Attributes:
        name: the stage.
        layers, experts, top_k: of what it trains.
        parameters, activated: likewise.
        flops_per_token: 6 for each activated parameter.
        iterations: from the first to the last.
        tokens, flops: of the stage, its extra compute.
        sunk: FLOPs of the stages before; None where the base was trained elsewhere.
        boundary: F_c of what it grows; None where it grows nothing.
        gpus: devices.
        memory: of the fullest rank.
        all_to_all: bytes a rank dispatches in one MoE layer, forward, each micro-batch.
        checkpoint: bytes on disk, optimizer included.
        load: bytes that a rank takes in at the start.
        notes: what will not fit, not divide, or is worth knowing.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    parameters: int
    activated: int
    flops_per_token: int
    iterations: tuple[int, int]
    tokens: int
    flops: int
    sunk: int | None
    boundary: int | None
    gpus: int
    memory: Memory
    all_to_all: int
    checkpoint: int
    load: int
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def budget(experiment: Experiment, links: list[Link]) -> list[StageBudget]:
    """The budget of each stage, in order."""
    stages: list[StageBudget] = []
    sunk = 0 if experiment.base is None else None
    for link in links:
        stages.append(_stage(experiment, link, sunk))
        if sunk is not None:
            sunk += stages[-1].flops
    return stages


def _stage(experiment: Experiment, link: Link, sunk: int | None) -> StageBudget:
    stage, model = link.stage, link.model
    gpus = stage.nodes * experiment.cluster.processes_per_node
    activated = _activated(model)
    per_token = FLOPS_PER_PARAMETER_AND_TOKEN * activated
    tokens = (link.last - link.first) * link.tokens
    sharding = _sharding(experiment, link, gpus)
    held = memory(model, tensors(model), sharding)
    total = link.parameters.total
    notes = [*_divide(link, gpus), *_fit(experiment, held), *_growth_notes(link, sunk)]
    return StageBudget(
        name=stage.name,
        layers=model.num_layers,
        experts=model.num_experts,
        top_k=model.moe_router_topk,
        parameters=total,
        activated=activated,
        flops_per_token=per_token,
        iterations=(link.first, link.last),
        tokens=tokens,
        flops=tokens * per_token,
        sunk=sunk,
        boundary=_boundary(link.base) if link.base and stage.growth else None,
        gpus=gpus,
        memory=held,
        all_to_all=all_to_all_bytes(model, sharding),
        checkpoint=total * BYTES_OF_A_PARAMETER,
        load=held.weights + held.optimizer,
        notes=tuple(notes),
    )


def _activated(model: Geometry) -> int:
    activated = count_parameters(tensors(model), architecture(model)).activated
    assert activated is not None  # a geometry says its top-k
    return activated.parameters


def _boundary(model: Geometry) -> int:
    activated = count_parameters(tensors(model), architecture(model)).activated
    assert activated is not None
    return activated.chinchilla_flops


def _sharding(experiment: Experiment, link: Link, gpus: int) -> Sharding:
    stage, layout = link.stage, link.stage.layout
    options = named(stage.megatron)
    data = max(1, gpus // (layout.tensor * layout.pipeline * layout.context))
    return Sharding(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual=layout.virtual or 1,
        context=layout.context,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        data=data,
        expert_data=max(1, gpus // (layout.pipeline * layout.expert * layout.expert_tensor)),
        tokens=stage.micro_batch_size * experiment.data.seq_length // layout.context,
        microbatches=max(1, stage.global_batch_size // (stage.micro_batch_size * data)),
        gradient_bytes=2 if options.get("grad-reduce-in-bf16") else 4,
        recomputed=_recomputed(options),
    )


def _recomputed(options: Mapping[str, Value | None]) -> tuple[str, ...]:
    if options.get("recompute-granularity") == "full":
        return ("full",)
    modules = options.get("recompute-modules")
    return tuple(map(str, modules)) if isinstance(modules, list) else ()


# -- what is worth saying


def _divide(link: Link, gpus: int) -> Iterator[str]:
    """What Megatron would refuse, or miss; the flag check says the same in its words."""
    stage, layout, model = link.stage, link.stage.layout, link.model
    dense = layout.tensor * layout.pipeline * layout.context
    expert = layout.expert * layout.expert_tensor * layout.pipeline
    stages = layout.pipeline * (layout.virtual or 1)
    pairs = [
        ("tensor x pipeline x context", dense, "GPUs", gpus),
        ("expert x expert_tensor x pipeline", expert, "GPUs", gpus),
        ("expert", layout.expert, "num_experts", model.num_experts),
        ("tensor", layout.tensor, "num_attention_heads", model.num_attention_heads),
    ]
    free = named(stage.megatron)
    if not any(name.startswith(("pipeline-model-parallel-layout", "decoder-")) for name in free):
        pairs.append(("pipeline x virtual", stages, "num_layers", model.num_layers))
    if gpus % dense == 0:
        batch = stage.micro_batch_size * (gpus // dense)
        pairs.append(
            ("micro_batch_size x data", batch, "global_batch_size", stage.global_batch_size)
        )
    for name, value, what, number in pairs:
        if number % value:
            yield f"does not divide: {name} ({value}) must divide {what} ({number})"


def _fit(experiment: Experiment, held: Memory) -> Iterator[str]:
    has = experiment.cluster.memory_gb * 1e9
    if experiment.cluster.device == "cpu":
        return
    if held.total + BUFFERS > has:
        yield (
            f"does not fit: {held.total / 1e9:.0f} GB and {BUFFERS / 1e9:.0f} GB of buffers, of "
            f"{has / 1e9:.0f} GB; recompute moe_act and layernorm, or take more expert, pipeline "
            "or data parallel ranks"
        )
    elif 1.15 * held.total + BUFFERS > has:
        yield (
            f"tight: {held.total / 1e9:.0f} GB and {BUFFERS / 1e9:.0f} GB of buffers, of "
            f"{has / 1e9:.0f} GB, by an estimate good to 15%"
        )


def _growth_notes(link: Link, sunk: int | None) -> Iterator[str]:
    growth = link.stage.growth
    if growth is None or growth.depth is None or link.base is None or sunk is None:
        return
    ratio = sunk / _boundary(link.base)
    advice = "interposition" if ratio > 1 else "stacking does as well"
    yield f"depth: {ratio:.1f} F_c sunk into the base; the paper finds for {advice}"
    if ratio > 1 and growth.depth.method == "stacking":
        yield "depth: stacking is the baseline that the paper beats here; use interposition"
