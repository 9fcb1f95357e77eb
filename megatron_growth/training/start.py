"""How a run starts: from the grown base the first time, from its own checkpoint ever after.

A requeued job is started with the same command line. It must neither grow twice nor begin again at
the base, so what happens is decided by what `--save` holds, and said in the log.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint.common_state import grown_args
from megatron_growth.checkpoint.directory import TRACKER, iteration_directory
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.config import (
    ContinueConfig,
    GrowthConfig,
    GrowthFile,
    LearningRateConfig,
)
from megatron_growth.errors import CheckpointError, ConfigError, PlanError
from megatron_growth.planning.build import router_growth
from megatron_growth.planning.keys import is_optimizer_key
from megatron_growth.planning.plan import GrowthPlan
from megatron_growth.planning.router import read_router
from megatron_growth.training import arguments

# What a user may say for the load of the base alone, and must not hold for a resume: option -> does
# it take a value.
_FIRST_LOAD_ONLY = {
    "--finetune": False,
    "--no-load-optim": False,
    "--no-load-rng": False,
    "--ckpt-step": True,
    "--override-ckpt-iteration": True,
}


@dataclass(frozen=True)
class Start:
    """A decided start.

    Attributes:
        argv: Megatron's command line.
        source: the base's `iter_*` directory when this start grows, None when it resumes.
        plan: the growth, None when it resumes.
        manifest: to be written beside the run's checkpoints once the base is loaded.
        message: what happens, for the log.
    """

    argv: list[str]
    source: Path | None
    plan: GrowthPlan | None
    manifest: dict[str, Any] | None
    message: str


def decide(config: GrowthFile, argv: Sequence[str]) -> Start:
    """Grow the base, or resume the run.

    Args:
        config: the configuration file.
        argv: the user's Megatron command line.

    Raises:
        ConfigError: the command line contradicts the plan or itself.
        CheckpointError: the base, or the run's own checkpoint, cannot be loaded.
        PlanError: the base cannot grow as configured.
    """
    given = arguments.given_arguments(argv)
    load, save = given.get("load") or config.base.load, given.get("save")
    if load is None:
        raise ConfigError("no base to grow: give --load DIR or `base.load` in the configuration")
    if save is not None and Path(save).resolve() == Path(load).resolve():
        raise ConfigError(
            f"--load and --save are the same directory {str(save)!r}; the base is never written "
            "to: give the run a directory of its own"
        )
    if given.get("ckpt_format", "torch_dist") != "torch_dist":
        raise ConfigError(
            f"--ckpt-format {given['ckpt_format']!r} does not load through the growth view; use "
            "torch_dist"
        )
    words = [*argv, *_schedule(config.continue_, given)]
    if save is not None and (Path(save) / TRACKER).is_file():
        return _resume(config, words, Path(save))
    return _grow(config, words, given, Path(load))


def _resume(config: GrowthFile, argv: Sequence[str], save: Path) -> Start:
    written = manifest.read(save)
    if written is not None and _recorded(GrowthConfig, written, "growth", save) != config.growth:
        raise ConfigError(
            f"{str(save)!r} holds a run grown by another configuration (see {manifest.MANIFEST} "
            "there); give --save a new directory, or the configuration it was grown by"
        )
    if written is not None and "written" in written and config.continue_ != ContinueConfig():
        raise ConfigError(
            f"{str(save)!r} was written to disk by `grow`, after which a run goes on as the base "
            "did; leave `continue:` out, or give --save a new directory to grow while loading"
        )
    if written is not None and "continue" in written:  # older manifests do not say
        started = _recorded(ContinueConfig, written, "continue", save)
        _check_continues_as_started(started, config.continue_, save)
    directory = iteration_directory(save)
    source = SourceCheckpoint(directory, weights_only=True)
    words = arguments.completed(
        _without(argv, {**_FIRST_LOAD_ONLY, "--load": True}), source.required_args()
    )
    message = f"{save} holds {directory.name}: resuming it as it is, nothing is grown"
    if any(map(is_optimizer_key, source.metadata.state_dict_metadata)):
        _check_expert_optimizer(source.required_args(), arguments.given_arguments(argv))
    else:
        words.append("--no-load-optim")
        message += "; it holds no optimizer state"
    return Start([*words, "--load", str(save)], None, None, None, message)


def _check_expert_optimizer(saved: Any, given: dict[str, Any]) -> None:
    """Upstream gives experts an optimizer of their own exactly when EP > 1, and cannot load the one
    form as the other."""
    before = getattr(saved, "expert_model_parallel_size", None) or 1
    now = given.get("expert_model_parallel_size", 1)
    if (before == 1) != (now == 1):
        raise ConfigError(
            f"expert_model_parallel_size ({now}) resumes a checkpoint of {before}, but Megatron "
            "cannot load optimizer state saved at 1 at more than 1, nor the other way; use a "
            "layout like the checkpoint's, or grow while loading, which can"
        )


def _recorded[Section: BaseModel](
    section: type[Section], written: dict[str, Any], key: str, save: Path
) -> Section:
    """As a configuration, so that a field added since has its default in both."""
    try:
        return section.model_validate(written.get(key))
    except ValidationError:
        raise CheckpointError(
            f"{str(save / manifest.MANIFEST)!r} does not say how the run was grown; restore or "
            "remove it"
        ) from None


def _check_continues_as_started(started: ContinueConfig, given: ContinueConfig, save: Path) -> None:
    """`continue:` is for the growth alone; a run that resumes would not do what a change of it
    says."""
    before, after = started.model_dump(mode="json"), given.model_dump(mode="json")
    for name in before:
        if before[name] != after[name]:
            raise ConfigError(
                f"continue.{name} is {after[name]!r}, but the run in {str(save)!r} was started "
                f"with {before[name]!r} and goes on with that; put it back, or give --save a new "
                "directory to grow anew"
            )


def _grow(config: GrowthFile, argv: Sequence[str], given: dict[str, Any], load: Path) -> Start:
    iteration = given.get("ckpt_step", config.base.iteration)
    directory = iteration_directory(load, iteration)
    source = SourceCheckpoint(directory, weights_only=config.growth.optimizer == "reset")
    args = source.required_args()
    plan = plan_for(source, config.growth)
    plan = _in_target_form(config.growth, source, plan, given)
    source.tensors, source.objects  # noqa: B018  every key known, every tensor whole, before anything starts
    words = arguments.completed(
        _without(argv, {"--load": True, "--ckpt-step": True}), grown_args(args, plan)
    )
    _check_experts_divide(given, plan)
    _check_optimizer(source, plan, given)
    _check_rate(config.continue_, source, given)
    words += ["--load", str(load)]
    words += _checkpoint_step(load, iteration)
    if plan.optimizer == "reset" and not given.get("no_load_optim"):
        words.append("--no-load-optim")
    message = _beginning(directory, plan, config.growth)
    if source.described_in:
        message += f"\n  the base's arguments are from its {source.described_in}"
    message += _undone(plan, given)
    message += "".join(f"\n  {line}" for line in _router_notes(config.growth, source, given))
    return Start(
        words,
        directory,
        plan,
        manifest.describe(source, load, config.growth, plan, config.continue_),
        message,
    )


def _check_rate(settings: ContinueConfig, source: SourceCheckpoint, given: dict[str, Any]) -> None:
    """A model that no run has trained has no learning rate; upstream fails on that with a
    TypeError."""
    if source.described_in and settings.learning_rate == "keep" and "lr" not in given:
        raise ConfigError(
            f"{str(source.directory)!r} has no learning rate to keep; say continue.learning_rate"
        )


def _beginning(directory: Path, plan: GrowthPlan, growth: GrowthConfig) -> str:
    if growth.as_is:
        what = f"going on from {directory} as it is"
    else:
        what = (
            f"growing {directory}: layers {plan.source.num_layers} -> {plan.target.num_layers}, "
            f"experts {plan.source.num_experts} -> {plan.target.num_experts}, "
            f"top-k {plan.source.top_k} -> {plan.target.top_k}"
        )
    return f"{what}; optimizer {plan.optimizer}; plan {plan.fingerprint[:12]}"


def _checkpoint_step(load: Path, iteration: int | str) -> list[str]:
    """Megatron's option for one iteration of a base. For `release` there is none: the tracker must
    name it."""
    if isinstance(iteration, int):
        return ["--ckpt-step", str(iteration)]
    latest = iteration_directory(load).name
    if iteration == "release" and latest != "release":
        raise CheckpointError(
            f"base.iteration 'release' cannot be loaded by Megatron, for {TRACKER} in "
            f"{str(load)!r} names {latest}; write 'release' in it, in a copy if need be"
        )
    return []


def _router_notes(
    growth: GrowthConfig, source: SourceCheckpoint, given: dict[str, Any]
) -> list[str]:
    """What the rules say of the router; one who gives an argument needs no advice on it."""
    grown = router_growth(growth, source.architecture, read_router(source.args))
    notes = grown.notes if grown else ()
    return [f"{note.severity}: {note.text}" for note in notes if note.argument not in given]


def _schedule(settings: ContinueConfig, given: dict[str, Any]) -> list[str]:
    """The learning-rate schedule of the configuration as Megatron's options."""
    rate = settings.learning_rate
    if rate == "keep":
        return []
    values: dict[str, Any] = {
        "lr": rate.peak,
        "min_lr": rate.min,
        "lr_decay_style": rate.decay_style,
        **_lengths(rate, given),
    }
    values = {name: value for name, value in values.items() if value is not None}
    clash = next((name for name in values if name in given and given[name] != values[name]), None)
    if clash:
        raise ConfigError(
            f"--{clash.replace('_', '-')} {given[clash]!r} contradicts continue.learning_rate in "
            f"the configuration, which sets {values[clash]!r}; say it in one place"
        )
    return arguments.render({name: value for name, value in values.items() if name not in given})


def _lengths(rate: LearningRateConfig, given: dict[str, Any]) -> dict[str, int | None]:
    """Warm-up and decay as the run counts: in iterations, or with `--train-samples` in samples."""
    lengths = {"lr_warmup": rate.warmup_iters, "lr_decay": rate.decay_iters}
    if not given.get("train_samples"):
        return {f"{name}_iters": iters for name, iters in lengths.items()}
    batch = _batch_size(given) if any(lengths.values()) else 0
    return {
        f"{name}_samples": None if iters is None else iters * batch
        for name, iters in lengths.items()
    }


def _batch_size(given: dict[str, Any]) -> int:
    """Samples of every iteration; known only where all have as many."""
    for name in ("rampup_batch_size", "step_batch_size_schedule"):
        if given.get(name):
            raise ConfigError(
                f"continue.learning_rate counts iterations and --train-samples samples, but with "
                f"--{name.replace('_', '-')} {given[name]!r} iterations are of different sizes; "
                "give the schedule in samples on the command line and leave continue.learning_rate "
                "out"
            )
    if not given.get("global_batch_size"):
        raise ConfigError(
            "continue.learning_rate counts iterations and --train-samples samples, and how many of "
            "these an iteration has is not said; give --global-batch-size"
        )
    return int(given["global_batch_size"])


def _in_target_form(
    growth: GrowthConfig, source: SourceCheckpoint, plan: GrowthPlan, given: dict[str, Any]
) -> GrowthPlan:
    """The grown model's key form follows the run's arguments: a list of MoE layers gives one key
    for each layer."""
    target = grown_args(source.args, plan)
    for name in ("moe_layer_freq", "linear_attention_freq"):
        if name in given:
            setattr(target, name, given[name])
    form = "per_layer" if arguments.has_per_layer_keys(target) else "stacked"
    if form == plan.target.key_form:
        return plan
    return plan_for(source, growth, form)


def _undone(plan: GrowthPlan, given: dict[str, Any]) -> str:
    """What the command line takes back of the configuration."""
    if given.get("finetune"):
        return (
            "\n  warning: --finetune starts iteration, data, schedule and optimizer anew, whatever "
            "the configuration says"
        )
    if given.get("no_load_optim") and plan.optimizer != "reset":
        return f"\n  warning: --no-load-optim drops what `optimizer: {plan.optimizer}` would keep"
    return ""


def _check_optimizer(source: SourceCheckpoint, plan: GrowthPlan, given: dict[str, Any]) -> None:
    """What `optimizer` says must be possible, and a restart must find the run's own checkpoint."""
    if given.get("non_persistent_ckpt_type"):
        raise ConfigError(
            f"--non-persistent-ckpt-type {given['non_persistent_ckpt_type']!r} would be loaded in "
            "place of the growth on a restart; leave it out until the run has a checkpoint"
        )
    if plan.optimizer == "reset" or given.get("no_load_optim") or given.get("finetune"):
        return
    if source.directory.name == "release" or not source.optimizer_states:
        raise PlanError(
            f"optimizer {plan.optimizer!r} needs the base's optimizer state, which "
            f"{str(source.directory)!r} does not have; use `optimizer: reset`"
        )


def _check_experts_divide(given: dict[str, Any], plan: GrowthPlan) -> None:
    parallel = given.get("expert_model_parallel_size", 1)
    if plan.target.num_experts % parallel:
        raise ConfigError(
            f"expert_model_parallel_size ({parallel}) must divide num_experts "
            f"({plan.target.num_experts}); "
            "choose another layout or width factor"
        )


def _without(argv: Sequence[str], options: dict[str, bool]) -> list[str]:
    """A command line without some options; each takes one value or none."""
    words: list[str] = []
    skip = False
    for word in argv:
        name = word.split("=", 1)[0]
        if skip:
            skip = False
        elif name in options:
            skip = options[name] and "=" not in word
        else:
            words.append(word)
    return words


def is_first_rank() -> bool:
    """Whether this process speaks for all: rank 0 of torchrun or SLURM's environment."""
    return os.environ.get("RANK", "0") == "0"
