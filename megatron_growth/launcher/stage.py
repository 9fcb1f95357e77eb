"""A stage of an experiment: training from random weights, training on, or that after growth."""

import math
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from megatron_growth.config import ContinueConfig, GrowthConfig, Iterations, LearningRateConfig
from megatron_growth.geometry import Options
from megatron_growth.sections import Positive, Strict, Written

# What a directory, a job of SLURM and one of Kubernetes may be called.
Name = Annotated[
    str,
    Written(
        "[a-z0-9]([-a-z0-9]*[a-z0-9])?",
        "lower-case letters and digits, with dashes between them, as in grown-35b",
        longest=63,
    ),
]


class Layout(Strict):
    """How a model lies on the devices; what is left over is data parallel."""

    tensor: Positive = 1
    """Tensor parallel."""

    pipeline: Positive = 1
    """Pipeline parallel."""

    virtual: Positive | None = None
    """Virtual stages of each pipeline rank; not interleaved by default."""

    context: Positive = 1
    """Context parallel."""

    expert: Positive = 1
    """Expert parallel."""

    expert_tensor: Positive = 1
    """Tensor parallel inside an expert."""


class Budget(Strict):
    """How long a stage trains; one of the three, rounded up to whole iterations."""

    tokens: Annotated[float, Field(gt=0, le=1e17)] | None = None
    """Tokens."""

    flops: Annotated[float, Field(gt=0, le=1e30)] | None = None
    """FLOPs, at 6 for each activated parameter and token, as the paper counts."""

    iterations: Iterations | None = None
    """Optimizer steps."""

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        given = [name for name in ("tokens", "flops", "iterations") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'nothing'} given; give one of tokens, flops, iterations"
            )
        return self


class Stage(Strict):
    """One training run."""

    name: Name
    """Its directory and part of its jobs' names: lower-case letters, digits and dashes, 63
    at most: `grown-35b`."""

    growth: GrowthConfig | None = None
    """How the stage before, or the base, is grown. Without it a stage trains that on as it is; the
    first stage of an experiment without a base trains from random weights."""

    continue_: Annotated[ContinueConfig, Field(alias="continue")] = ContinueConfig()
    """What goes on from the stage before, or the base, and what starts anew. `decay_iters` of a
    rate that decays is the stage's budget by default."""

    learning_rate: LearningRateConfig | None = None
    """Of training from random weights. Any other stage has its own in `continue`."""

    nodes: Positive
    """Nodes, of `processes_per_node` each."""

    layout: Layout = Layout()
    """Parallel layout."""

    global_batch_size: Positive
    """Sequences in an optimizer step."""

    micro_batch_size: Positive = 1
    """Sequences in a forward pass of one rank."""

    budget: Budget
    """How long."""

    save_interval: Positive
    """Iterations between checkpoints. It bounds what a node failure costs."""

    megatron: Options = {}
    """Whatever else says how the stage runs, by the names of Megatron's options without `--`:
    `bf16: true`, `recompute-modules: [moe_act]`; null takes one of the defaults back."""


class Data(Strict):
    """What is trained on."""

    train: list[str | float] = []
    """Prefixes of Megatron's indexed datasets, each with its weight before it where there are
    several: [0.7, data/web, 0.3, data/code]."""

    valid: list[str | float] = []
    """The held-out set, likewise; none by default."""

    mock: bool = False
    """Made-up data instead, for trying a layout."""

    seq_length: Positive
    """Tokens of a sequence."""

    tokenizer: str = "HuggingFaceTokenizer"
    """Megatron's tokenizer type."""

    tokenizer_model: str | None = None
    """Its file or name."""

    cache: Path | None = None
    """Directory for Megatron's index files; beside the data by default."""

    @model_validator(mode="after")
    def _some(self) -> "Data":
        if bool(self.train) == self.mock:
            raise ValueError("give `train` or `mock: true`, one of the two")
        for name in ("train", "valid"):
            _check_blend(name, getattr(self, name))
        return self


def _check_blend(name: str, parts: list[str | float]) -> None:
    """Upstream counts what it is given, and takes words for weights or weights for words."""
    weights = list(filter(_is_weight, parts))
    if weights and list(map(_is_weight, parts)) != [True, False] * len(weights):
        raise ValueError(
            f"{name} {parts!r}: a weight stands before each prefix, or none does; write it as in "
            "[0.7, data/web, 0.3, data/code]"
        )
    if any(float(weight) <= 0 for weight in weights):
        raise ValueError(f"{name} {parts!r}: weights must be above 0; leave out what has none")


def _is_weight(part: str | float) -> bool:
    """1e-1 is text to YAML."""
    try:
        return math.isfinite(float(part))
    except ValueError:
        return False
