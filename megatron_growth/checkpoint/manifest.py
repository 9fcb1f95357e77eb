"""`growth_manifest.json`: how a run's weights came to be, beside its checkpoints.

It is written when a base has been grown and read when the run starts again, so that growth happens
once. The plan in it says where every number came from; the fingerprint of the base says from which
bytes.
"""

import hashlib
import json
import os
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_growth.checkpoint.durable import write_safely
from megatron_growth.checkpoint.noise import STREAM_VERSION
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.config import ContinueConfig, GrowthConfig
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.plan import GrowthPlan

MANIFEST = "growth_manifest.json"
_PACKAGES = ("megatron-growth", "megatron-core", "torch", "numpy")


def describe(
    source: SourceCheckpoint,
    base: str | Path,
    growth: GrowthConfig,
    plan: GrowthPlan,
    settings: ContinueConfig | None = None,
) -> dict[str, Any]:
    """The manifest of one growth.

    Args:
        source: the base, opened.
        base: its Megatron checkpoint directory; recorded as an absolute path, which means the same
            wherever the manifest is read from.
        growth: what the user asked for.
        plan: what was made of it.
        settings: what went on from the base; None where no run was started.
    """
    started = {} if settings is None else {"continue": settings.model_dump(mode="json")}
    return {
        "base": str(base) if str(base).startswith("msc:") else os.path.abspath(base),
        "iteration": (source.common_state or {}).get("iteration"),
        "directory": source.directory.name,
        "base_fingerprint": hashlib.sha256(
            (source.directory / ".metadata").read_bytes()
        ).hexdigest(),
        "growth": growth.model_dump(mode="json"),
        **started,
        "plan": json.loads(plan.to_json()),
        "plan_fingerprint": plan.fingerprint,
        "seed": plan.seed,
        "noise_scale": {"experts": plan.noise.experts, "router": plan.noise.router},
        "noise_stream_version": STREAM_VERSION,
        "optimizer": plan.optimizer,
        "versions": {name: _version(name) for name in _PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        # The manifest of the base, when that was grown itself: stages chain.
        "ancestor": read(source.directory.parent),
    }


def write(directory: str | Path, manifest: dict[str, Any]) -> Path:
    """Write it whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / MANIFEST
    write_safely(path, json.dumps(manifest, indent=2) + "\n")
    return path


def read(directory: str | Path) -> dict[str, Any] | None:
    """The manifest in a checkpoint directory, None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = Path(directory) / MANIFEST
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error}); restore or remove it") from None


def base_iteration(manifest: dict[str, Any]) -> int | str:
    """Which checkpoint of the base a manifest is of, as a configuration says it; one that lacks the
    directory's name has at least an iteration, or the base said none."""
    name = str(manifest.get("directory", ""))
    number = name.removeprefix("iter_")
    if number.isdigit():
        return int(number)
    iteration = manifest.get("iteration")
    return "release" if name == "release" else "latest" if iteration is None else iteration


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
