"""Megatron's common state as the grown model's: the arguments that describe it.

`check_checkpoint_args` (megatron/training/checkpointing.py) compares layers on load, and
`--use-checkpoint-args` overwrites layers, experts and top-k with the checkpoint's. Both must find
the grown model's.
"""

import copy
from argparse import Namespace
from typing import Any

from megatron_growth.planning.patterns import PATTERN_ARGUMENTS, grown
from megatron_growth.planning.plan import GrowthPlan


def grown_common_state(state: dict[str, Any], plan: GrowthPlan) -> dict[str, Any]:
    """A copy of the base's common state that describes the grown model.

    Args:
        state: the base's, left as it is.
        plan: the growth.
    """
    result = dict(state)
    if "args" in state:
        result["args"] = grown_args(state["args"], plan)
    if plan.optimizer == "reset":
        result.pop("optimizer", None)
    return result


def grown_args(args: Namespace, plan: GrowthPlan) -> Namespace:
    """A copy of Megatron's arguments with layers, experts, top-k and every per-layer list grown."""
    result = copy.copy(args)
    for name, value in architecture_changes(args, plan).items():
        setattr(result, name, value)
    return result


def architecture_changes(args: Namespace, plan: GrowthPlan) -> dict[str, Any]:
    """The arguments that growth changes, and their new values."""
    changes: dict[str, Any] = {}
    if not plan.layers.is_identity:
        changes["num_layers"] = plan.target.num_layers
        if getattr(args, "encoder_num_layers", None) is not None:
            changes["encoder_num_layers"] = plan.target.num_layers
        for name in PATTERN_ARGUMENTS:
            value = getattr(args, name, None)
            if (new := grown(name, value, plan.layers)) != value:
                changes[name] = new
        # A pipeline layout names every layer of the base; the run gives its own.
        if getattr(args, "pipeline_model_parallel_layout", None) is not None:
            changes["pipeline_model_parallel_layout"] = None
    if not plan.experts.is_identity:
        changes["num_experts"] = plan.target.num_experts
        changes["moe_router_topk"] = plan.target.top_k
    changes.update(plan.arguments)
    return changes
