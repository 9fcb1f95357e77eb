"""The manifest beside a grown checkpoint: whether what it says of the growth, and of the base,
holds."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint.noise import STREAM_VERSION
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.checkpoint.verify.problem import Problem
from megatron_growth.config import GrowthConfig
from megatron_growth.errors import CheckpointError, PlanError
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.plan import GrowthPlan
from megatron_growth.planning.router import read_router


def plan_of(written: dict[str, Any], name: str) -> GrowthPlan:
    """The plan in a manifest.

    Raises:
        CheckpointError: it holds none that can be read, or noise of another version.
        PlanError: another version of this package wrote it.
    """
    version = written.get("noise_stream_version")
    if version != STREAM_VERSION:
        raise CheckpointError(
            f"{name} says noise stream version {version!r} but this megatron_growth draws version "
            f"{STREAM_VERSION}; verify with the version that grew it"
        )
    try:
        return GrowthPlan.from_json(json.dumps(written["plan"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name} holds no whole plan ({type(error).__name__}: {error}); restore it, or give "
            "--config"
        ) from None


def check_manifest(
    written: dict[str, Any], plan: GrowthPlan, source: SourceCheckpoint
) -> Iterator[Problem]:
    """What in the manifest contradicts itself or the base."""
    actual = {
        "plan_fingerprint": _hash(_canonical(written["plan"])),
        "base_fingerprint": _hash((source.directory / ".metadata").read_bytes()),
        "iteration": (source.common_state or {}).get("iteration"),
        "seed": plan.seed,
        "noise_scale": {"experts": plan.noise.experts, "router": plan.noise.router},
        "optimizer": plan.optimizer,
    }
    for field, value in actual.items():
        if (stated := written.get(field)) != value:
            yield Problem(manifest.MANIFEST, f"says {field} {stated!r}, but it is {value!r}")
    yield from _check_growth(written, plan, source)


def _check_growth(
    written: dict[str, Any], plan: GrowthPlan, source: SourceCheckpoint
) -> Iterator[Problem]:
    """The configuration it names, planned anew for this base, gives the plan it holds."""
    try:
        growth = GrowthConfig.model_validate(written.get("growth"))
        again = build_plan(
            growth,
            source.architecture,
            masters=source.masters,
            target_form=plan.target.key_form,
            router=read_router(source.args),
        )
    except (ValidationError, PlanError) as error:
        line = " ".join(str(error).split())
        yield Problem(
            manifest.MANIFEST, f"has a growth that cannot be planned for this base: {line}"
        )
        return
    before, after = json.loads(plan.to_json()), json.loads(again.to_json())
    for field in sorted(before.keys() | after.keys()):  # an empty field is left out
        held, given = before.get(field), after.get(field)
        if held != given:
            said = f"has a plan with {field} {held!r}"
            yield Problem(manifest.MANIFEST, f"{said}, but its growth of this base gives {given!r}")


def _canonical(plan: dict[str, Any]) -> bytes:
    return json.dumps(plan, sort_keys=True).encode()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
