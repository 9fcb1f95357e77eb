"""What a run of the demo writes down: one line of JSON for each training step and each held-out loss.

The numbers are taken from Megatron's own functions at full precision. Its log would not do: the second loss that it
prints after any start is the mean of the first two.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def recording(path: Path | None) -> Iterator[None]:
    """While inside, this process records what Megatron's `pretrain()` measures, if it has the loss.

    Three names of megatron/training/training.py (0.19.2) are wrapped: `train` (line 3353), `training_log` (2568) and
    `evaluate` (4160). The model is evaluated once before the first step: for a grown model that is growth itself.

    Args:
        path: the file, appended to by the last rank; None to record nothing.
    """
    if path is None:
        yield
        return
    recorder = _Recorder(path)
    with ExitStack() as stack:
        for name in ("train", "training_log", "evaluate"):
            stack.enter_context(_wrapped(name, getattr(recorder, name)))
        yield


class _Recorder:
    """What the wrapped names do. Each wrapper takes the original first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._iteration = 0  # the last one finished

    def train(
        self,
        original: Callable[..., Any],
        forward_step: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        train_data: Any,
        heldout: Any,
        process_other: Any,
        config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The arguments are those with which `pretrain()` evaluates after training (line 1483)."""
        from megatron.training import get_args, training

        self._iteration = get_args().iteration
        groups = {name: kwargs.get(name) for name in ("pg_collection", "p2p_communicator")}
        training.evaluate_and_print_results(
            "start", forward_step, heldout, model, self._iteration, process_other, config, **groups
        )
        return original(
            forward_step, model, optimizer, scheduler, train_data, heldout, process_other, config, *args, **kwargs
        )

    def training_log(
        self,
        original: Callable[..., Any],
        losses: Any,
        total: Any,
        learning_rate: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self._iteration = iteration
        if "lm loss" in losses:
            self._write("train", losses["lm loss"], learning_rate=learning_rate)
        return original(losses, total, learning_rate, iteration, *args, **kwargs)

    def evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        losses, *rest = original(*args, **kwargs)
        if losses and "lm loss" in losses:
            self._write("heldout", losses["lm loss"])
        return (losses, *rest)

    def _write(self, kind: str, loss: Any, **more: Any) -> None:
        """The last rank is on the last pipeline stage, where the loss is, the same on all of its ranks."""
        from megatron.training.utils import is_last_rank

        if is_last_rank():
            row = {"kind": kind, "iteration": self._iteration, "loss": float(loss), **more}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


@contextmanager
def _wrapped(name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    from megatron.training import training

    original = getattr(training, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(training, name, replacement)
    try:
        yield
    finally:
        setattr(training, name, original)
