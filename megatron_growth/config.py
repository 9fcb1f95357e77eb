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

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from megatron_growth.errors import ConfigError
from megatron_growth.overrides import overridden, shown_path
from megatron_growth.yaml_text import parse


class Strict(BaseModel):
    """A section of a file of ours: frozen, no unknown keys, each field documented below it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_by_alias=True,
        validate_by_name=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_disguise(cls, value: object, info: ValidationInfo) -> object:
        """To pydantic true is 1."""
        assert info.field_name is not None
        if isinstance(value, bool) and not _takes_bool(
            cls.model_fields[info.field_name].annotation
        ):
            raise PydanticCustomError("bool", "true and false are no value here")
        return value


class DepthConfig(Strict):
    """Depth growth: more layers, each a copy of one of the base's."""

    method: Literal["interposition", "stacking", "map"] = "interposition"
    """How layers are placed: `interposition` duplicates each in place (arXiv:2510.08008, the
    method), `stacking` repeats the whole block (the paper's baseline), `map` takes your own
    list."""

    factor: Annotated[int, Field(ge=2)] | None = None
    """Copies of each layer that is not skipped, the original counted; 2 when neither this nor
    `target_layers` is given."""

    target_layers: Annotated[int, Field(ge=1)] | None = None
    """Layers of the grown model, instead of `factor`; copies are spread evenly."""

    map: list[int] | None = None
    """For `method: map`: entry t is the source layer of target layer t, both counted from 0."""

    skip_first: Annotated[int, Field(ge=0)] = 0
    """First layers left single; the paper's text uses 0, its released launcher 2."""

    skip_last: Annotated[int, Field(ge=0)] = 0
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

    experts: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """alpha for expert weights; sigma over one projection of one expert. 0.01 is the paper's."""

    router: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """alpha for router rows; sigma over the layer's router matrix. 0.01 is the paper's."""


class WidthConfig(Strict):
    """Width growth: each expert, and its router row, becomes `factor` clones."""

    factor: Annotated[int, Field(ge=2)] = 2
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

    iteration: Annotated[int, Field(ge=0)] | Literal["latest", "release"] = "latest"
    """Which iteration of it; `release` is the checkpoint in the directory of that name, which has
    none."""


class LearningRateConfig(Strict):
    """A schedule that starts anew at the growth, warm-up first."""

    peak: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Learning rate after the warm-up."""

    warmup_iters: Annotated[int, Field(ge=0)] = 0
    """Iterations of linear warm-up from zero, counted from the growth."""

    decay_style: Literal["constant", "cosine", "linear", "inverse-square-root"] = "constant"
    """What follows the warm-up; the paper's grown models train at a constant rate until they
    anneal."""

    decay_iters: Annotated[int, Field(ge=1)] | None = None
    """Iterations from the growth to the end of the decay; Megatron's `--train-iters` when not
    given."""

    min: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
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

    offset: Annotated[int, Field(ge=0)]
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
    try:
        return GrowthFile.model_validate(overridden(content, settings))
    except ValidationError as error:
        where = "--set" if path is None else path
        raise ConfigError(f"{where}: {explain(error, GrowthFile)}") from None


def is_experiment(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is an experiment's rather than a growth file's."""
    return not {"stages", "model", "data", "cluster", "defaults"}.isdisjoint(content)


def read_mapping(path: str | Path, needed: str) -> dict[str, Any]:
    """The content of a YAML file.

    Args:
        path: the file.
        needed: what an empty file lacks, for the error.

    Raises:
        ConfigError: it is missing, not YAML, or no mapping.
    """
    try:
        content = parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"configuration {str(path)!r} cannot be read: {error}; give the path of a YAML file"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"configuration {str(path)!r} is not YAML: {' '.join(str(error).split())}"
        ) from None
    if content is None:
        raise ConfigError(f"configuration {str(path)!r} is empty; it needs {needed}, see configs/")
    if not isinstance(content, dict):
        what = "a list" if isinstance(content, list) else repr(content)
        raise ConfigError(
            f"configuration {str(path)!r} holds {what}, not keys with values; it needs {needed}, "
            "see configs/"
        )
    return content


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """What pydantic found wrong, as one line: where, what, what the field means, and the nearest
    known key."""
    found = first(error)
    location = location_of(found)
    where = shown_path(location)
    if found["type"] == "extra_forbidden":
        known = list(_fields_at(model, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    message = found["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if found["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if found["type"] == "missing":
        return f"{where}: is missing; {_meaning(model, location)}"
    shown = f"{where}{_shown(found['input'])}"
    if found["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"{shown}: is no section; {_section_meant(found['input'])}"
    if found["type"] == "string_pattern_mismatch":
        message = "is not of the right form"
    return f"{shown}: {message[0].lower()}{message[1:]}; {_meaning(model, location)}"


def first(error: ValidationError) -> ErrorDetails:
    """The error that is told. Of a union's members, the one that the value came closest to fitting
    speaks: the deepest."""
    return max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))


def location_of(found: ErrorDetails) -> tuple[int | str, ...]:
    """Where in the file."""
    return tuple(part for part in found["loc"] if not _is_union_tag(part))


def _shown(value: object) -> str:
    """A value beside its path, as the file has it; a section's content would be too much."""
    if isinstance(value, dict):
        return ""
    plain = value is None or isinstance(value, str | int | float | list)
    shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return f" {shown}" if plain else f" {value}"


def _section_meant(value: object) -> str:
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        return f"to take that file write {{extends: {value}}}"
    return "give its fields, as {field: value, ...}"


def _takes_bool(annotation: Any) -> bool:
    """Whether a field's type, or a member of it, is bool or anything at all."""
    if annotation in (bool, Any, object):
        return True
    return any(map(_takes_bool, getattr(annotation, "__args__", ())))


def _meaning(model: type[BaseModel], location: tuple[Any, ...]) -> str:
    """What a field's documentation says, on one line."""
    while location:
        *above, name = location
        field = _fields_at(model, tuple(above)).get(name)
        if field is not None:
            return f"{name}: {' '.join((field.description or '').split())}"
        location = tuple(above)  # an entry of a list or of a free mapping: its field speaks
    return ""


def _is_union_tag(part: object) -> bool:
    """Pydantic puts the tried member of a union into an error's location: a type's name, a
    literal's values."""
    return isinstance(part, str) and (
        part.startswith(("literal[", "constrained-", "list["))
        or part in (section.__name__ for section in Strict.__subclasses__())
        or part in ("bool", "float", "int", "str", "[key]")
    )


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> dict[str, FieldInfo]:
    """The fields, by the key they have in YAML, of the section at `location`; none where it is no
    section."""
    for part in location:
        if isinstance(part, int):
            continue  # a list's sections are found by the list's own key
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        section = field and _section(field.annotation)
        if not section:
            return {}
        model = section
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type: itself, a union's member, a list's entry."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    members = getattr(annotation, "__args__", ())
    return next((found for found in map(_section, members) if found), None)
