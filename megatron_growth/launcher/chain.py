"""The stages with all that follows from their order: what each starts from, which model it trains,
and from which iteration to which.

Pure, but for the iteration of an existing base, which only its directory may know.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_growth.checkpoint.directory import TRACKER
from megatron_growth.config import MOST, BaseConfig, GrowthConfig, LearningRateConfig
from megatron_growth.errors import ConfigError, GrowthError
from megatron_growth.geometry import Geometry
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.stage import Budget, Stage
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.cost import (
    FLOPS_PER_PARAMETER_AND_TOKEN,
    ParameterCount,
    count_parameters,
)
from megatron_growth.planning.inventory import architecture, tensors
from megatron_growth.planning.patterns import grown as grown_pattern

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Link:
    """A stage in its chain.

    Attributes:
        stage: as the file says.
        path: where the file says it, for errors: `stages[1]`.
        directory: everything of the stage.
        model: what it trains, grown.
        growth: how its base is loaded, grown or as it is; None where it trains from random weights.
        base: the model it starts from, None likewise.
        parent: the checkpoint of that, None likewise.
        outside: whether that is the experiment's base, and no stage before.
        first: iteration it starts at.
        last: iteration it ends at, Megatron's `--train-iters`.
        tokens: in one iteration.
    """

    stage: Stage
    path: str
    directory: Path
    model: Geometry
    growth: GrowthConfig | None
    base: Geometry | None
    parent: BaseConfig | None
    outside: bool
    first: int
    last: int
    tokens: int

    @property
    def checkpoints(self) -> Path:
        return self.directory / CHECKPOINTS

    @property
    def parameters(self) -> ParameterCount:
        return count_parameters(tensors(self.model), architecture(self.model))


def chain(experiment: Experiment) -> list[Link]:
    """The stages in order.

    Raises:
        ConfigError: a stage cannot follow the one before.
    """
    links: list[Link] = []
    for index, stage in enumerate(experiment.stages):
        before = links[-1] if links else None
        links.append(_link(experiment, stage, f"stages[{index}]", before))
    return links


def _link(experiment: Experiment, stage: Stage, path: str, before: Link | None) -> Link:
    base = before.model if before else experiment.model
    model = grown(base, stage.growth, f"{path}.growth") if stage.growth else base
    tokens = stage.global_batch_size * experiment.data.seq_length
    parent = BaseConfig(load=before.checkpoints) if before else _settled(experiment.base)
    if parent is None or stage.continue_.iteration == "reset":
        first = 0
    else:
        first = before.last if before else _iteration(parent)
    iterations = _iterations(stage.budget, tokens, model)
    _check_warmup(stage, iterations, path)
    return Link(
        stage=stage,
        path=path,
        directory=experiment.directory / stage.name,
        model=model,
        growth=(stage.growth or GrowthConfig(as_is=True)) if parent else None,
        base=base if parent else None,
        parent=parent,
        outside=before is None and parent is not None,
        first=first,
        last=first + iterations,
        tokens=tokens,
    )


def _check_warmup(stage: Stage, iterations: int, path: str) -> None:
    """Upstream asserts it when the schedule is made, after the model is built and loaded."""
    rates = {
        "learning_rate": stage.learning_rate,
        "continue.learning_rate": stage.continue_.learning_rate,
    }
    for name, rate in rates.items():
        if isinstance(rate, LearningRateConfig) and rate.warmup_iters >= iterations:
            raise ConfigError(
                f"{path}.{name}.warmup_iters {rate.warmup_iters}: must be below the iterations of "
                f"the stage ({iterations}); lower it or raise the budget"
            )


def grown(model: Geometry, growth: GrowthConfig, path: str) -> Geometry:
    """The geometry of the grown model.

    Args:
        model: the base.
        growth: how.
        path: where the file says so, for errors.
    """
    try:
        plan = build_plan(growth, architecture(model))
        pattern = grown_pattern("moe_layer_freq", model.moe_layer_freq, plan.layers)
    except GrowthError as error:
        raise ConfigError(f"{path}: {error}") from None
    for name, number in (("layers", plan.target.num_layers), ("experts", plan.target.num_experts)):
        if number is not None and number > MOST:
            raise ConfigError(f"{path}: makes {number} {name}, and {MOST} is the most; lower it")
    changes = {
        "num_layers": plan.target.num_layers,
        "num_experts": plan.target.num_experts,
        "moe_router_topk": plan.target.top_k,
        "moe_layer_freq": pattern,
    }
    return model.model_copy(update=changes)


def _iterations(budget: Budget, tokens: int, model: Geometry) -> int:
    if budget.iterations is not None:
        return budget.iterations
    wanted = budget.tokens
    if wanted is None:
        activated = count_parameters(tensors(model), architecture(model)).activated
        assert budget.flops is not None
        assert activated is not None  # a geometry says its top-k
        wanted = budget.flops / (FLOPS_PER_PARAMETER_AND_TOKEN * activated.parameters)
    return math.ceil(wanted / tokens)


def _settled(base: BaseConfig | None) -> BaseConfig | None:
    """With the number of its latest iteration, where that can be read: the base may train on."""
    if base is None or base.load is None or base.iteration != "latest":
        return base
    try:
        number = int((base.load / TRACKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return base
    return base.model_copy(update={"iteration": number})


def _iteration(base: BaseConfig) -> int:
    assert base.load is not None  # the experiment saw to it
    if base.iteration == "release":  # it has none
        return 0
    if base.iteration != "latest":
        return base.iteration
    raise ConfigError(
        f"base.iteration 'latest': {str(base.load / TRACKER)!r} does not say which that is, "
        "and the first stage counts on from it; give the number, or let the stage say "
        "`continue: {iteration: reset, data: reset}`"
    )
