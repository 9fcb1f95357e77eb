"""What an experiment costs and whether it fits, stage by stage, before anything runs."""

from dataclasses import asdict, dataclass
from typing import Any

from megatron_growth.geometry import Geometry
from megatron_growth.launcher.budget_notes import Note, notes
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.render import BYTES_OF_A_PARAMETER
from megatron_growth.launcher.sharding import sharding
from megatron_growth.planning.cost import (
    FLOPS_PER_PARAMETER_AND_TOKEN,
    Activated,
    count_parameters,
)
from megatron_growth.planning.inventory import architecture, tensors
from megatron_growth.planning.memory import Memory, all_to_all_bytes, delivered_bytes, memory


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
        chunks: into which pipeline and virtual stages cut the layers.
        memory: of the fullest rank.
        all_to_all: bytes a rank dispatches in one MoE layer, forward, each micro-batch.
        all_to_all_before: the same for the model that it grows, in this stage's layout; None where
            it grows nothing.
        checkpoint: bytes on disk, optimizer included.
        load: bytes that a checkpoint gives the rank that takes most, when it starts.
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
    chunks: tuple[int, int]
    memory: Memory
    all_to_all: int
    all_to_all_before: int | None
    checkpoint: int
    load: int
    notes: tuple[Note, ...]

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
    activated = _activated(model)
    per_token = FLOPS_PER_PARAMETER_AND_TOKEN * activated.parameters
    tokens = (link.last - link.first) * link.tokens
    lies = sharding(experiment, link)
    held = memory(model, tensors(model), lies)
    total = link.parameters.total
    grows = link.base if stage.growth else None
    boundary = _activated(grows).chinchilla_flops if grows else None
    fresh = stage.growth is not None and stage.growth.optimizer == "reset"
    return StageBudget(
        name=stage.name,
        layers=model.num_layers,
        experts=model.num_experts,
        top_k=model.moe_router_topk,
        parameters=total,
        activated=activated.parameters,
        flops_per_token=per_token,
        iterations=(link.first, link.last),
        tokens=tokens,
        flops=tokens * per_token,
        sunk=sunk,
        boundary=boundary,
        gpus=stage.nodes * experiment.cluster.processes_per_node,
        chunks=(lies.pipeline, lies.virtual),
        memory=held,
        all_to_all=all_to_all_bytes(model, lies),
        all_to_all_before=all_to_all_bytes(grows, lies) if grows else None,
        checkpoint=total * BYTES_OF_A_PARAMETER,
        load=delivered_bytes(model, tensors(model), lies, optimizer=not fresh),
        notes=tuple(notes(experiment, link, held, boundary, sunk)),
    )


def _activated(model: Geometry) -> Activated:
    activated = count_parameters(tensors(model), architecture(model)).activated
    assert activated is not None  # a geometry says its top-k
    return activated
