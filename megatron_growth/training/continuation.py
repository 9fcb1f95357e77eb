"""The base's common state as this run's: what goes on, what starts anew, and param groups that fit.

Upstream makes three demands that growth must meet before its loader will take an optimizer's state:

- Expert parameters have an optimizer of their own exactly when EP > 1, and the state must be cut
  the same way (`ChainedOptimizer.load_state_dict`, megatron/core/optimizer/optimizer.py).
- Param groups are matched by learning rate and weight decay among others
  (`param_group_identifier_keys`), so a new rate finds no group; and where it does, the
  checkpoint's `max_lr` wins over the run's.
- The schedule's every number must equal the checkpoint's
  (`OptimizerParamScheduler.load_state_dict`).

So the run's own groups and schedule are put where the base's were, and of the base's only what is
history stays: the step that Adam has reached, the position in the schedule, the samples consumed.
"""

import copy
from typing import Any

from megatron_growth.config import ContinueConfig, DataOffset
from megatron_growth.errors import CheckpointError


def continued(
    state: dict[str, Any], settings: ContinueConfig, optimizer: Any, scheduler: Any
) -> dict[str, Any]:
    """The common state that this run loads.

    Args:
        state: the grown model's common state; left as it is.
        settings: what goes on.
        optimizer: the run's Megatron optimizer, None where it has none.
        scheduler: the run's `OptimizerParamScheduler`, None where it has none.

    Raises:
        CheckpointError: the base's optimizer state has no single step.
    """
    result = dict(state)
    if settings.iteration == "reset" and "iteration" in result:
        result["iteration"] = 0
    if settings.data != "keep" and "args" in result:
        result["args"] = copy.copy(result["args"])
        result["args"].consumed_train_samples = _offset(settings)
        result["args"].skipped_train_samples = 0
    if scheduler is not None:
        result["opt_param_scheduler"] = {
            **scheduler.state_dict(),
            "num_steps": schedule_position(state, settings),
        }
    if optimizer is not None and "optimizer" in result:
        result["optimizer"] = optimizer_state(result["optimizer"], optimizer)
    return result


def schedule_position(state: dict[str, Any], settings: ContinueConfig) -> int:
    """Samples into the learning-rate schedule at which the run starts."""
    if settings.learning_rate != "keep":
        return 0
    return int(state.get("opt_param_scheduler", {}).get("num_steps", 0))


def optimizer_state(saved: dict[Any, Any], optimizer: Any) -> Any:
    """The base's common optimizer state with the run's optimizers and param groups.

    Args:
        saved: `{optimizer: ...}` of one optimizer, or `{0: ..., 1: ...}` of several chained.
        optimizer: the run's.
    """
    parts = (
        [saved[i] for i in sorted(saved)] if all(isinstance(key, int) for key in saved) else [saved]
    )
    step = _step(parts)
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    fitted = [_fitted(parts[0], part, step) for part in chained]
    return fitted[0] if len(fitted) == 1 else dict(enumerate(fitted))


def _fitted(template: dict[str, Any], optimizer: Any, step: int | None) -> dict[str, Any]:
    """One optimizer's state: the template's form, the run's groups."""
    state = copy.deepcopy(template)
    inner = state.get("optimizer", state)
    saved_step = any("step" in group for group in inner["param_groups"])
    groups = [] if optimizer.optimizer is None else optimizer.optimizer.param_groups
    inner["param_groups"] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    if saved_step:
        for group in inner["param_groups"]:
            group["step"] = step
    return state


def _step(parts: list[dict[str, Any]]) -> int | None:
    """The step that Adam has reached, one for all parameters: in each group, or as
    `common_step`."""
    steps: set[int] = set()
    for part in parts:
        inner = part.get("optimizer", part)
        steps.update(
            int(group["step"]) for group in inner["param_groups"] if group.get("step") is not None
        )
        common = inner.get("state", {}).get("common_step")
        steps.update([] if common is None else [int(common)])
    if len(steps) > 1:
        raise CheckpointError(
            f"the base's optimizer has parameters at different steps {sorted(steps)}, which one "
            "growth cannot continue; use `optimizer: reset`"
        )
    return steps.pop() if steps else None


def _offset(settings: ContinueConfig) -> int:
    return settings.data.offset if isinstance(settings.data, DataOffset) else 0
