"""The experiment: one file from the first base to the last grown run.

    name: moe-17b-70b
    runs: runs
    model: {num_layers: 28, hidden_size: 2048, ...}
    data: {train: [data/web], seq_length: 4096, ...}
    cluster: {extends: ../clusters/h100.yaml}
    defaults: {save_interval: 500, megatron: {bf16: true}}
    stages:
      - {name: base-17b, nodes: 8, learning_rate: {peak: 3.0e-4}, budget: {tokens: 600.0e+9}, ...}
      - {name: grown-35b, nodes: 16, growth: {depth: {factor: 2}}, budget: {tokens: 300.0e+9}, ...}

Any section may say `extends: FILE`; what stands beside it wins over the file, section by section.
`defaults` is laid under every stage likewise. Both are gone once the file is loaded.

What grows is said as in a growth file (`megatron_growth.config`): a stage's `growth` and `continue`
are the very sections, and the base is the stage before. Launching a stage writes that growth file,
for `plan`, `verify` and `pretrain` to take.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from megatron_growth.config import BaseConfig, ContinueConfig, is_experiment
from megatron_growth.errors import ConfigError
from megatron_growth.geometry import Geometry
from megatron_growth.launcher.cluster import Cluster
from megatron_growth.launcher.extends import extended, merged, origin
from megatron_growth.launcher.stage import Data, Name, Stage
from megatron_growth.mistakes import explain, place
from megatron_growth.overrides import overridden, sets
from megatron_growth.paths import Step
from megatron_growth.sections import Strict


class Experiment(Strict):
    """A whole experiment."""

    name: Name
    """Its directory and part of its jobs' names: lower-case letters, digits and dashes, 63 at most:
    `moe-17b-70b`."""

    runs: Path = Path("runs")
    """Directory of all experiments; this one is in `runs/name`, its stages below. On a cluster: on
    storage that all nodes share."""

    base: BaseConfig | None = None
    """An existing checkpoint to start from. Without it the first stage trains one."""

    model: Geometry
    """The base, or what the first stage trains."""

    data: Data
    """What is trained on."""

    cluster: Cluster
    """Where it runs; `--cluster FILE` puts another profile in its place."""

    stages: Annotated[list[Stage], Field(min_length=1)]
    """In order; each grows the one before, or trains it on."""

    @model_validator(mode="after")
    def _in_order(self) -> "Experiment":
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(
                    f"stages[{index}].name {name!r}: stages[{names.index(name)}] has it too; name "
                    "them apart"
                )
        if self.base is not None and self.base.load is None:
            raise ValueError("base: names no checkpoint; set base.load")
        if self.base is None and self.stages[0].growth is not None:
            raise ValueError(
                f"stages[0].growth: the first stage ({names[0]!r}) grows, and there is no base; "
                "give `base: {load: DIR}` or put a stage before it that trains one"
            )
        return self

    @property
    def directory(self) -> Path:
        return self.runs / self.name


def load_experiment(
    path: str | Path, settings: Sequence[str] = (), cluster: Path | None = None
) -> Experiment:
    """Read an experiment.

    Args:
        path: its file.
        settings: `PATH=VALUE` each, made after `extends` and before `defaults`.
        cluster: a profile instead of the file's.

    Raises:
        ConfigError: the file, one that it extends, or a setting is at fault.
    """
    content = extended(Path(path), "`model`, `data`, `cluster` and `stages`")
    if not is_experiment(content):
        raise ConfigError(
            f"{path} is no experiment, which has `model`, `data`, `cluster` and `stages`; give "
            "one, as in configs/experiments/"
        )
    if cluster is not None:
        content["cluster"] = extended(cluster, "a cluster profile")
    content = _with_defaults(overridden(content, settings), path)
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        at = place(error, content)
        file = Path(path) if sets(settings, at) else _origin(Path(path), cluster, at)
        by = "" if file in (Path(path), cluster) else f", extended by {path}"
        message = explain(error, Experiment, content, extends=True)
        raise ConfigError(f"{file}{by}: {message}") from None
    for index, stage in enumerate(experiment.stages):
        _check_rate(stage, f"{path}: stages[{index}]", index == 0 and experiment.base is None)
    return experiment


def _origin(path: Path, cluster: Path | None, at: tuple[Step, ...]) -> Path:
    """The file that says what stands there; the experiment where none does."""
    if cluster is not None and at[:1] == ("cluster",):
        return origin(cluster, at[1:]) or cluster
    default = ("defaults", *at[2:]) if at[:1] == ("stages",) else at
    return origin(path, at) or origin(path, default) or path


def _check_rate(stage: Stage, path: str, from_scratch: bool) -> None:
    """What a stage starts from decides where it says its learning rate."""
    if from_scratch and stage.learning_rate is None:
        raise ConfigError(
            f"{path}: `learning_rate` is missing; training from random weights needs one"
        )
    if from_scratch and stage.continue_ != ContinueConfig():
        raise ConfigError(
            f"{path}: `continue` says what goes on from a base; this stage trains from random "
            "weights: drop it"
        )
    if not from_scratch and stage.learning_rate is not None:
        raise ConfigError(
            f"{path}: `learning_rate` is for training from random weights; this stage has a base: "
            "say it in `continue.learning_rate`"
        )


def _with_defaults(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    defaults = content.pop("defaults", None) or {}
    stages = content.get("stages")
    if not isinstance(defaults, dict):
        raise ConfigError(
            f"{path}: defaults {defaults!r}: must be a section of a stage's fields, which every "
            "stage has unless it says otherwise; write it as in `defaults: {nodes: 2}`"
        )
    if isinstance(stages, list):
        content["stages"] = [
            merged(defaults, stage) if isinstance(stage, dict) else stage for stage in stages
        ]
    return content


def stage_named(experiment: Experiment, name: str) -> Stage:
    """The stage of that name.

    Raises:
        ConfigError: there is none.
    """
    found = next((stage for stage in experiment.stages if stage.name == name), None)
    if found is None:
        names = ", ".join(stage.name for stage in experiment.stages)
        raise ConfigError(f"--stage {name!r} is none of {experiment.name!r}; it has {names}")
    return found
