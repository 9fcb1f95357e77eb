"""The seam in Megatron: its own loader, reading the grown view instead of the base.

`dist_checkpointing.load` takes no storage reader. It gets one from `_get_filesystem_reader`,
defined in megatron/core/dist_checkpointing/strategies/torch.py and imported by name into
dist_checkpointing/serialization.py; the `common.pt` of older checkpoints comes through
`serialization.load_common`. Inside `growth_on_load` these three names answer for the source
directory with the view, for every other directory as upstream does. They are the same in
megatron-core 0.17, 0.18 and 0.19.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_growth.checkpoint.common_state import grown_common_state
from megatron_growth.checkpoint.reader import GrowthStorageReader
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.config import ContinueConfig
from megatron_growth.errors import CheckpointError, GrowthError
from megatron_growth.planning.plan import GrowthPlan
from megatron_growth.training.continuation import continued, schedule_position


@contextmanager
def growth_on_load(
    source: Path,
    plan: GrowthPlan,
    settings: ContinueConfig = ContinueConfig(),  # noqa: B008  frozen
    on_loaded: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """While inside, Megatron loads `source`, an `iter_*` directory, as the grown model.

    Args:
        source: the base.
        plan: the growth.
        settings: what goes on from the base, and what starts anew.
        on_loaded: called on every rank when the grown base is in the model.

    Raises:
        GrowthError: this megatron-core has no such seam.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from megatron.training import training

    seam = _Seam(source.resolve(), plan, settings, on_loaded)
    with ExitStack() as stack:
        stack.enter_context(_wrapped(strategies, "_get_filesystem_reader", seam.reader))
        if hasattr(serialization, "_get_filesystem_reader"):  # since 0.19
            stack.enter_context(_wrapped(serialization, "_get_filesystem_reader", seam.reader))
        stack.enter_context(_wrapped(serialization, "load_common", seam.common))
        stack.enter_context(_wrapped(training, "load_checkpoint", seam.checkpoint))
        yield


class _Seam:
    """What the wrapped names do. Each wrapper takes the original first."""

    def __init__(
        self,
        source: Path,
        plan: GrowthPlan,
        settings: ContinueConfig,
        on_loaded: Callable[[], None],
    ) -> None:
        self._source = source
        self._plan = plan
        self._settings = settings
        self._on_loaded = on_loaded
        self._reader: GrowthStorageReader | None = None
        self._adjust: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def reader(
        self, original: Callable[..., Any], checkpoint_dir: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Wrap whatever reader upstream chose (torch's, a caching one, one for object stores)."""
        base = original(checkpoint_dir, *args, **kwargs)
        if Path(checkpoint_dir).resolve() != self._source:
            return base
        if self._reader is None:
            self._reader = GrowthStorageReader(
                checkpoint_dir, self._plan, base, adjust=lambda state: self._adjust(state)
            )
        return self._reader

    def common(
        self, original: Callable[..., Any], checkpoint_dir: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        state = original(checkpoint_dir, *args, **kwargs)
        if Path(checkpoint_dir).resolve() != self._source:
            return state
        if "args" not in state:  # Megatron-Bridge's, which says them elsewhere
            state = SourceCheckpoint(checkpoint_dir, weights_only=True).common_state or state
        return self._adjust(grown_common_state(state, self._plan))

    def checkpoint(
        self,
        original: Callable[..., Any],
        model: Any,
        optimizer: Any,
        scheduler: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The load itself: now the run's optimizer and schedule are known."""
        from megatron.training import get_args

        self._adjust = lambda state: continued(state, self._settings, optimizer, scheduler)
        with _wrapped(torch.nn.Module, "load_state_dict", _strictly):
            result = original(model, optimizer, scheduler, *args, **kwargs)
        if self._reader is None:
            raise CheckpointError(
                f"Megatron loaded its checkpoint past the growth of {str(self._source)!r}: nothing "
                "has grown; use --ckpt-format torch_dist and leave --load to the growth "
                "configuration"
            )
        args = get_args()
        if args.no_load_optim and not args.finetune and scheduler is not None:
            # Without optimizer state upstream leaves the schedule at its start.
            position = schedule_position(self._reader.source.common_state or {}, self._settings)
            scheduler.step(increment=position - scheduler.num_steps)
        self._reader = None  # the metadata of a large base would stay in memory for the whole run
        self._on_loaded()
        return result


def _strictly(
    original: Callable[..., Any], module: torch.nn.Module, state: Any, *args: Any, **kwargs: Any
) -> Any:
    """Upstream repeats a failed strict load as a lax one and only prints what it lacked; we raise.

    Upstream: `load_model_state_dict` in megatron/training/checkpointing.py. Extra state is what
    that fallback is for.
    """
    result = original(module, state, *args, **kwargs)
    lost = [
        key
        for key in (*result.missing_keys, *result.unexpected_keys)
        if not key.endswith("_extra_state")
    ]
    if lost:
        raise CheckpointError(
            f"the model and the grown checkpoint disagree on {len(lost)} tensors, {lost[0]} first; "
            "the run's architecture arguments do not fit the base"
        )
    return result


@contextmanager
def _wrapped(owner: ModuleType | type, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Replace `owner.name` by `wrapper(original, ...)`; put it back whatever happens."""
    original = getattr(owner, name, None)
    if original is None:
        raise GrowthError(
            f"{owner.__name__} has no {name}: growth at load needs megatron-core 0.17 to 0.19; "
            "install 0.19"
        )

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)
