"""Verification from end to end: open both, check the manifest, the tensors, the objects, the common
state."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint.common_state import grown_common_state
from megatron_growth.checkpoint.reader import GrowthStorageReader
from megatron_growth.checkpoint.source import COMMON_OBJECT, SourceCheckpoint, load_common_state
from megatron_growth.checkpoint.verify.common_state import check_common_state
from megatron_growth.checkpoint.verify.definition import Definition
from megatron_growth.checkpoint.verify.objects import check_objects
from megatron_growth.checkpoint.verify.problem import Problem
from megatron_growth.checkpoint.verify.provenance import check_manifest, plan_of
from megatron_growth.checkpoint.verify.stored import Stored
from megatron_growth.checkpoint.verify.tensors import Progress, TensorCheck
from megatron_growth.config import GrowthConfig
from megatron_growth.errors import CheckpointError, ConfigError
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.keys import KeyForm, is_optimizer_key
from megatron_growth.planning.plan import GrowthPlan
from megatron_growth.planning.router import read_router

# decoder.layers.3.mlp.router.weight
_LAYER_IN_KEY = re.compile(r"decoder\.layers\.\d+\.")


@dataclass(frozen=True)
class Verification:
    """What verification looked at and what it found.

    Attributes:
        base: the base's `iter_*` directory.
        grown: the grown checkpoint's, or what stands for it: the view of the base.
        fingerprint: of the plan.
        tensors: of the grown checkpoint, compared in full.
        elements: of them.
        nbytes: of them.
        objects: compared.
        seconds: that it took.
        problems: everything wrong, in the order found.
    """

    base: str
    grown: str
    fingerprint: str
    tensors: int
    elements: int
    nbytes: int
    objects: int
    seconds: float
    problems: tuple[Problem, ...]

    @property
    def passed(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class _Grown:
    """What is verified, from wherever it comes; the common state is read when it is asked for."""

    stored: Stored
    common_state: Callable[[], Mapping[str, Any] | None]


def verify(
    base: Path,
    grown: Path | None = None,
    *,
    growth: GrowthConfig | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Verification:
    """Whether a grown checkpoint is exactly what growing the base gives.

    Args:
        base: the base's `iter_*` directory.
        grown: that of a checkpoint with the grown weights, as they are before any training; None
            verifies what `GrowthStorageReader` shows of the base.
        growth: how it was grown; by default what the manifest beside `grown` says.
        on_progress: called with the bytes compared so far and in all.

    Raises:
        CheckpointError: either cannot be read, or nothing says how it was grown.
        PlanError: the base cannot grow as configured.
    """
    start = time.monotonic()
    base, grown = Path(base), None if grown is None else Path(grown)
    written, plan = _stated(grown, growth)
    optimizer = plan.optimizer if plan else growth.optimizer  # type: ignore[union-attr]
    source = SourceCheckpoint(base, weights_only=optimizer == "reset")
    source.tensors, source.objects  # noqa: B018  every key known, every tensor whole, before anything is compared
    problems: list[Problem] = []
    if plan is None:
        assert growth is not None
        plan = _planned(growth, source, grown)
    if written is not None:
        problems += check_manifest(written, plan, source)
    target = _view(base, plan) if grown is None else _checkpoint(grown)
    held = Stored(str(base), source.reader, source.metadata, lambda key: _takes_part(key, plan))
    definition = Definition(plan, {key: held.shape(key) for key in held.tensors})
    tensors = TensorCheck(
        definition, held, target.stored, plan.masters, problems.append, on_progress
    )
    tensors.run()
    num_objects = check_objects(plan, held, target.stored, problems.append)
    try:
        check_common_state(plan, source.common_state, target.common_state(), problems.append)
    except CheckpointError as error:  # the grown one's: the base's has been read
        problems.append(Problem(COMMON_OBJECT, str(error)))
    if not tensors.elements and not problems:
        problems.append(Problem("", "nothing was compared"))
    return Verification(
        base=str(base),
        grown=target.stored.name,
        fingerprint=plan.fingerprint,
        tensors=len(tensors.elements),
        elements=tensors.elements.total(),
        nbytes=tensors.nbytes,
        objects=num_objects,
        seconds=time.monotonic() - start,
        problems=tuple(problems),
    )


def _stated(
    grown: Path | None, growth: GrowthConfig | None
) -> tuple[dict[str, Any] | None, GrowthPlan | None]:
    """The manifest, and the plan in it; neither where the configuration says how it grew."""
    if growth is not None:
        return None, None
    if grown is None:
        raise ConfigError(
            "nothing says what to verify; give a grown checkpoint, or a configuration for the view"
        )
    written = manifest.read(grown.parent) or manifest.read(grown)
    if written is None:
        raise CheckpointError(
            f"there is no {manifest.MANIFEST} beside {str(grown)!r}, so how it was grown is not "
            "known; give --config"
        )
    return written, plan_of(written, str(grown.parent / manifest.MANIFEST))


def _planned(growth: GrowthConfig, source: SourceCheckpoint, grown: Path | None) -> GrowthPlan:
    """The plan of a configuration; the key form follows the grown checkpoint where there is one."""
    made = partial(
        build_plan,
        growth,
        source.architecture,
        masters=source.masters,
        router=read_router(source.args),
    )
    if grown is None:
        return made()
    keys = SourceCheckpoint(grown).metadata.state_dict_metadata
    form: KeyForm = "per_layer" if any(map(_LAYER_IN_KEY.match, keys)) else "stacked"
    return made(target_form=form)


def _takes_part(key: str, plan: GrowthPlan) -> bool:
    return plan.optimizer != "reset" or not is_optimizer_key(key)


def _checkpoint(directory: Path) -> _Grown:
    source = SourceCheckpoint(directory)
    stored = Stored(str(directory), source.reader, source.metadata)
    return _Grown(stored, lambda: source.common_state)


def _view(base: Path, plan: GrowthPlan) -> _Grown:
    """The base as growth at load shows it, through a reader of its own."""
    reader = GrowthStorageReader(base, plan)
    metadata = reader.view.chunked_metadata()  # so that a part is read without all of its tensor
    stored = Stored(f"the view of {base}", reader, metadata)
    if COMMON_OBJECT in stored.objects:
        return _Grown(stored, lambda: load_common_state(base, metadata, reader))
    # megatron-core before 0.19 keeps it in common.pt, beside what DCP reads; so the load hook grows
    # it.
    state = reader.source.common_state
    return _Grown(stored, lambda: None if state is None else grown_common_state(state, plan))
