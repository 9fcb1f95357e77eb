"""The entry points' common frame: our own options, the CPU backend, the hook, one-line errors.

    torchrun ... -m megatron_growth.pretrain --growth-config growth.yaml \\
        --load BASE --save RUN <Megatron arguments>
    torchrun ... -m megatron_growth.run path/to/their_pretrain.py --growth-config growth.yaml \\
        <its arguments>
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch.distributed.checkpoint.api import CheckpointException

from megatron_growth.checkpoint import manifest
from megatron_growth.config import ContinueConfig, load_config
from megatron_growth.errors import CheckpointError, ConfigError, GrowthError
from megatron_growth.training import cpu_backend, fused_adam, start
from megatron_growth.training.arguments import given_arguments
from megatron_growth.training.load_hook import growth_on_load

_SECONDS_FOR_RANK_0 = 5
# decoder.layers.pre_mlp_layernorm.weight from model not in state dict: [...]
# upstream: MCoreLoadPlanner, megatron/core/dist_checkpointing/strategies/torch.py
_NOT_IN_CHECKPOINT = re.compile(r"(?P<key>\S+) from model not in state dict")


# OptimizerParamScheduler: class input value 0.0005 and checkpointvalue 0.001 for learning rate do
# not match
# upstream: megatron/core/optimizer_param_scheduler.py
_OTHER_SCHEDULE = re.compile(
    r"OptimizerParamScheduler: class input value (?P<given>.+) and checkpoint ?value (?P<held>.+) "
    r"for (?P<name>.+) do not match"
)


def train(argv: Sequence[str], pretrain: Callable[[list[str]], None]) -> None:
    """Run `pretrain` with Megatron's command line, its first load grown.

    Args:
        argv: our options and Megatron's, mixed.
        pretrain: runs Megatron's `pretrain()` on a command line.
    """
    path, words = _own_options(argv)
    config = load_config(path)
    if cpu_backend.needed():
        cpu_backend.install()  # before megatron is imported
        words = [*words, *cpu_backend.arguments(words)]
    begin = start.decide(config, words)
    say(begin.message)
    with fused_adam.where_missing(), _hook(begin, config.continue_):
        pretrain(begin.argv)


def _hook(begin: start.Start, settings: ContinueConfig) -> AbstractContextManager[None]:
    """Growth on the first load; nothing for a run that resumes."""
    if begin.source is None or begin.plan is None:
        return nullcontext()
    return growth_on_load(begin.source, begin.plan, settings, on_loaded=lambda: _record(begin))


def _record(begin: start.Start) -> None:
    """The base is in the model: write the manifest beside where the run's checkpoints will be."""
    save = given_arguments(begin.argv).get("save")
    if save and start.is_first_rank():
        say(f"base loaded; {manifest.write(save, begin.manifest or {})} says how")


def say(message: str) -> None:
    """Tell the log, once for all ranks."""
    if start.is_first_rank():
        print(f"megatron_growth: {message}", flush=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End this rank with one line and exit code 2 on an error that the user can put right.

    All ranks meet most errors alike. Rank 0 speaks; the others give it time, for the launcher ends
    every rank when the first one fails. A rank that fails alone speaks for itself.
    """
    try:
        yield
    except (GrowthError, CheckpointException, AssertionError) as error:
        cause = _cause(error)
        if cause is None:
            raise
        if not start.is_first_rank():
            time.sleep(_SECONDS_FOR_RANK_0)
        rank = "" if start.is_first_rank() else f" (rank {os.environ['RANK']})"
        print(f"megatron_growth: error{rank}: {cause}", file=sys.stderr, flush=True)
        # Not sys.exit: Megatron's process groups and threads would be waited for, on ranks that
        # never come.
        os._exit(2)


def _cause(error: BaseException) -> GrowthError | None:
    """DCP wraps what a reader raises, by rank; the schedule's mismatch is an assertion."""
    if isinstance(error, GrowthError):
        return error
    if isinstance(error, AssertionError):
        return _other_schedule(str(error))
    for failure, _ in getattr(error, "failures", {}).values():
        if isinstance(failure, GrowthError):
            return failure
        if match := _NOT_IN_CHECKPOINT.match(str(failure).strip("'\"")):
            return CheckpointError(
                f"the run asks for {match['key']}, which the checkpoint does not have; give it the "
                "base's precision, optimizer and --transformer-impl, or use `optimizer: reset`"
            )
    return None


def _other_schedule(said: str) -> ConfigError | None:
    """A run that resumes with another schedule than it was started with."""
    match = _OTHER_SCHEDULE.search(said)
    if match is None:
        return None
    unit = ", in samples," if "iterations" in match["name"] else ""
    return ConfigError(
        f"the run's {match['name']}{unit} is {match['held']} but now {match['given']}; give the "
        "schedule and length that it was started with, or --override-opt-param-scheduler (rates "
        "stay those of the checkpoint: for another rate grow into a new --save)"
    )


def _own_options(argv: Sequence[str]) -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--growth-config")
    own, words = parser.parse_known_args(list(argv))
    if own.growth_config is None:
        raise ConfigError(
            "--growth-config FILE is missing; give the growth configuration, see configs/"
        )
    return own.growth_config, words
