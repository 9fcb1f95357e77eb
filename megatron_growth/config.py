"""The configuration file: a `base` to grow and the `growth` to apply.

    base: {load: checkpoints/moe-17b, iteration: latest}
    growth:
      depth: {method: interposition, factor: 2}
      width: {factor: 2, noise: {experts: 0.01, router: 0.01}}
      optimizer: rescale
      seed: 1234

An unknown key is an error that names the nearest known one. `GrowthConfig` alone is what the
library takes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from megatron_growth.errors import ConfigError
from megatron_growth.mistakes import explain
from megatron_growth.overrides import overridden
from megatron_growth.sections import Count, Strict
from megatron_growth.yaml_text import read_yaml

# No model has more layers, no router more experts; a slip of the keyboard has.
MOST = 10_000
Many = Annotated[int, Field(ge=1, le=MOST)]
Factor = Annotated[int, Field(ge=2, le=1000)]
Iterations = Annotated[int, Field(ge=1, le=10**9)]

# What an experiment has at its top, and a growth file has not.
_OF_EXPERIMENTS = {"name", "runs", "model", "data", "cluster", "defaults", "stages"}


class DepthConfig(Strict):
    """Depth growth: more layers, each a copy of one of the base's."""

    method: Literal["interposition", "stacking", "map"] = "interposition"
    """How layers are placed: `interposition` duplicates each in place (arXiv:2510.08008, the
    method), `stacking` repeats the whole block (the paper's baseline), `map` takes your own
    list."""

    factor: Factor | None = None
    """Copies of each layer that is not skipped, the original counted; 2 when neither this nor
    `target_layers` is given."""

    target_layers: Many | None = None
    """Layers of the grown model, instead of `factor`; copies are spread evenly."""

    map: Annotated[list[int], Field(max_length=MOST)] | None = None
    """For `method: map`: entry t is the source layer of target layer t, both counted from 0."""

    skip_first: Count = 0
    """First layers left single; the paper's text uses 0, its released launcher 2."""

    skip_last: Count = 0
    """Last layers left single."""

    new_layer_init: Literal["copy", "zero_output"] = "copy"
    """`copy` as in the paper; `zero_output` zeroes the copies' projections into the residual
    stream, so that the grown model computes exactly what the base does."""

    @model_validator(mode="after")
    def _one_size(self) -> "DepthConfig":
        if self.method == "map":
            given = [name for name in ("factor", "target_layers") if getattr(self, name)]
            given += [name for name in ("skip_first", "skip_last") if getattr(self, name)]
            if self.map is None or given:
                raise ValueError(
                    "method 'map' takes its layers from `map` alone, got "
                    f"{', '.join(given) or 'no map'}; "
                    "give `map` and nothing else that sets the size"
                )
        elif self.map is not None:
            raise ValueError(
                f"`map` goes with method 'map', not {self.method!r}; set method or drop `map`"
            )
        elif self.factor is not None and self.target_layers is not None:
            raise ValueError(
                f"factor ({self.factor}) and target_layers ({self.target_layers}) both set the "
                "size; give one"
            )
        return self


class NoiseConfig(Strict):
    """Noise on clones: N(0, (alpha * sigma)^2), sigma the standard deviation of the original
    tensor."""

    experts: Annotated[float, Field(ge=0)] = 0.01
    """alpha for expert weights; sigma over one projection of one expert. 0.01 is the paper's."""

    router: Annotated[float, Field(ge=0)] = 0.01
    """alpha for router rows; sigma over the layer's router matrix. 0.01 is the paper's."""


class WidthConfig(Strict):
    """Width growth: each expert, and its router row, becomes `factor` clones."""

    factor: Factor = 2
    """Clones of each expert, the original counted."""

    top_k: Literal["scale", "keep"] = "scale"
    """`scale` multiplies top-k with the experts, as the paper does; `keep` leaves it, which changes
    the function unless clones are parked."""

    clones: Literal["active", "parked"] = "active"
    """`active` clones take tokens at once; `parked` ones (with `top_k: keep` and an `expert_bias`
    on sigmoid scores) take none until balancing has raised their bias: the function is exactly
    kept, whatever the noise."""

    order: Literal["auto", "interleave", "append"] = "auto"
    """Where clones stand: `interleave` beside the original, on its expert-parallel rank; `append`
    after all originals, as the paper's released code; `auto` is `interleave` wherever that keeps
    the function."""

    noise: NoiseConfig = NoiseConfig()
    """Noise scales."""

    @model_validator(mode="after")
    def _parked_at_kept_top_k(self) -> "WidthConfig":
        if self.clones == "parked" and self.top_k == "scale":
            raise ValueError(
                f"clones 'parked' take no tokens, but top_k 'scale' sends each token to "
                f"{self.factor} times as many experts; set `top_k: keep` or `clones: active`"
            )
        return self


class GrowthConfig(Strict):
    """What to grow; `depth`, `width` or both."""

    depth: DepthConfig | None = None
    """Depth growth, none by default."""

    width: WidthConfig | None = None
    """Width growth, none by default."""

    optimizer: Literal["rescale", "copy", "reset"] = "rescale"
    """What becomes of Adam's moments: `rescale` as the split gradient asks, `copy` as they are,
    `reset` drops
    them and the masters with them: weights only."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Seed of the noise; nothing else is random."""

    as_is: bool = False
    """Grow nothing: the base is loaded as it is, at any layout, and goes on as `continue` says, at
    another learning rate too, which Megatron's own load refuses."""

    @model_validator(mode="after")
    def _something_grows(self) -> "GrowthConfig":
        given = [name for name in ("depth", "width") if getattr(self, name)]
        if self.as_is and given:
            raise ValueError(f"as_is grows nothing, and {' and '.join(given)} would; drop one")
        if not given and not self.as_is:
            raise ValueError(
                "neither `depth` nor `width` is given, so nothing would grow; give one of them, or "
                "`as_is: true` to train on"
            )
        return self


class BaseConfig(Strict):
    """The source checkpoint."""

    load: Path | None = None
    """Megatron checkpoint directory, the one that holds `latest_checkpointed_iteration.txt`;
    `--load` overrides it."""

    iteration: Count | Literal["latest", "release"] = "latest"
    """Which iteration of it; `release` is the checkpoint in the directory of that name, which has
    none."""


class LearningRateConfig(Strict):
    """A schedule that starts anew at the growth, warm-up first."""

    peak: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up."""

    warmup_iters: Count = 0
    """Iterations of linear warm-up from zero, counted from the growth."""

    decay_style: Literal["constant", "cosine", "linear", "inverse-square-root"] = "constant"
    """What follows the warm-up; the paper's grown models train at a constant rate until they
    anneal."""

    decay_iters: Iterations | None = None
    """Iterations from the growth to the end of the decay; Megatron's `--train-iters` when not
    given."""

    min: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""

    @model_validator(mode="after")
    def _decay_after_warmup(self) -> "LearningRateConfig":
        if self.decay_iters is not None and self.warmup_iters >= self.decay_iters:
            raise ValueError(
                f"warmup_iters ({self.warmup_iters}) must be below decay_iters "
                f"({self.decay_iters}), which counts from the growth too; lower one"
            )
        return self


class DataOffset(Strict):
    """Where in the data to go on."""

    offset: Annotated[int, Field(ge=0, lt=2**63)]
    """Samples taken as consumed, counted from the start of the data."""


class ContinueConfig(Strict):
    """What goes on from the base when training starts on the grown model, and what starts anew."""

    data: Literal["keep", "reset"] | DataOffset = "keep"
    """`keep` goes on with the next sample that the base has not seen; `reset` starts the data over;
    `{offset: N}` takes N samples as consumed."""

    iteration: Literal["keep", "reset"] = "keep"
    """`keep` counts on from the base's iteration; `reset` counts from 0. `--train-iters` is the
    last one either way."""

    learning_rate: Literal["keep"] | LearningRateConfig = "keep"
    """`keep` goes on at the base's place in its schedule (or in the one that the command line
    gives); otherwise a schedule that starts at the growth."""

    @model_validator(mode="after")
    def _upstream_can(self) -> "ContinueConfig":
        starts_over = self.data == "reset" or (
            isinstance(self.data, DataOffset) and self.data.offset == 0
        )
        if starts_over and self.iteration == "keep":
            raise ValueError(
                "data from the start at a kept iteration is not possible: Megatron takes 0 "
                "consumed samples at iteration > 0 for an old checkpoint and skips iteration * "
                "batch; add `iteration: reset`"
            )
        return self


class GrowthFile(Strict):
    """A growth file: what is grown, how, and how training goes on."""

    base: BaseConfig = BaseConfig()
    """What is grown."""

    growth: GrowthConfig
    """How it is grown."""

    continue_: Annotated[ContinueConfig, Field(alias="continue")] = ContinueConfig()
    """How training goes on."""


def load_config(path: str | Path | None, settings: Sequence[str] = ()) -> GrowthFile:
    """Read a configuration file.

    Args:
        path: the file; None starts from an empty one.
        settings: changes to it, as `--set` takes them.

    Raises:
        ConfigError: it is missing, not YAML, or not a configuration; one line for the first thing
            wrong.
    """
    content = {} if path is None else read_mapping(path, "a `growth:` section")
    if is_experiment(content):
        raise ConfigError(
            f"{path} is an experiment, which `launch` and `plan` take; give the growth.yaml of one "
            "of its stages, which `launch` writes"
        )
    content = overridden(content, settings)
    try:
        return GrowthFile.model_validate(content)
    except ValidationError as error:
        where = "--set" if path is None else path
        raise ConfigError(f"{where}: {explain(error, GrowthFile, content)}") from None


def is_experiment(content: Mapping[str, Any]) -> bool:
    """Whether a file is an experiment, whatever it forgets, rather than a growth file."""
    return "stages" in content or not (_OF_EXPERIMENTS.isdisjoint(content) or "growth" in content)


def read_mapping(path: str | Path, needed: str) -> dict[str, Any]:
    """The content of a YAML file.

    Args:
        path: the file.
        needed: what an empty file lacks, for the error.

    Raises:
        ConfigError: it is missing, not YAML, or no mapping.
    """
    source = f"configuration {str(path)!r}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"{source} cannot be read: it is no text in UTF-8; give the path of a YAML file"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{source} cannot be read: {error.strerror}; give the path of a YAML file"
        ) from None
    content = read_yaml(text, source)
    if content is None:
        raise ConfigError(f"{source} is empty; it needs {needed}, see configs/")
    if not isinstance(content, dict):
        what = "a list" if isinstance(content, list) else "a value"
        raise ConfigError(
            f"{source} holds {what} where fields are meant; it needs {needed}, see configs/"
        )
    return content
