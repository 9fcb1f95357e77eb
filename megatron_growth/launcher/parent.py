"""Before a stage goes on from a base: can it?

The base exists only once the stage before is done, so no check before the launch can look at it.
This one does in seconds, before any model is built: its metadata must give the plan, and its last
logged loss must be a number. `megatron-growth verify` is the thorough one.
"""

import re
from pathlib import Path

from megatron_growth.checkpoint.directory import TRACKER, iteration_directory
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.config import load_config
from megatron_growth.errors import GrowthError
from megatron_growth.launcher.logs import ends_of_logs

# Upstream leaves a loss that is NaN out of its line, and counts it at the line's end.
_LAST = re.compile(
    r"iteration +\d+/ *\d+ \|(?:.*? lm loss: (?P<loss>\S+) \|)?"
    r"(?:.*? number of nan iterations: +(?P<nan>\d+) \|)?"
)


def parent_problem(growth: Path, checkpoints: Path) -> str | None:
    """Why a stage cannot start from its base; None where it can, or has started.

    Args:
        growth: the stage's growth file.
        checkpoints: of the stage.
    """
    if (checkpoints / TRACKER).exists():
        return None
    try:
        config = load_config(growth)
        assert config.base.load is not None  # the launcher writes it
        directory = iteration_directory(config.base.load, config.base.iteration)
        source = SourceCheckpoint(directory, weights_only=config.growth.optimizer == "reset")
        plan_for(source, config.growth)
    except GrowthError as error:
        return f"the base: {error}"
    said = _not_a_number(config.base.load.parent)
    if said:
        return (
            f"the base: the stage before ended with {said}, see {str(config.base.load.parent)!r}; "
            "grow an earlier iteration, or train it again"
        )
    return None


def _not_a_number(stage: Path) -> str | None:
    for text in ends_of_logs(stage):
        found = list(_LAST.finditer(text))
        if found:
            if int(found[-1]["nan"] or 0):
                return "losses that are NaN"
            loss = (found[-1]["loss"] or "").lower()
            return f"a loss of {loss}" if "inf" in loss or "nan" in loss else None
    return None
