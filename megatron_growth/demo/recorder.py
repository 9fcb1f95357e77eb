"""What a run of the demo writes down: a line of JSON for each training step and held-out loss.

The numbers are taken from Megatron's own functions at full precision. Its log would not do: the
second loss that it prints after any start is the mean of the first two.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def recording(path: Path | None) -> Iterator[None]:
    """While inside, this process records what Megatron's `pretrain()` measures, if it has the loss.

    Three names of megatron/training/training.py (0.19.2) are wrapped: `train` (line 3353),
    `training_log` (2568) and `evaluate` (4160). The model is evaluated once before the first step:
    for a grown model, that is growth itself.

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
    """What the wrapped names do. Each wrapper takes the original first, then its arguments."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._iteration = 0  # the last one finished

    def train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate first, as `pretrain()` does it after training (line 1483)."""
        from megatron.training import get_args, training

        forward_step, model, _, _, _, samples, process_other, config, *_ = args
        groups = {name: kwargs.get(name) for name in ("pg_collection", "p2p_communicator")}
        self._iteration = get_args().iteration
        training.evaluate_and_print_results(
            "start", forward_step, samples, model, self._iteration, process_other, config, **groups
        )
        return original(*args, **kwargs)

    def training_log(
        self, original: Callable[..., Any], losses: Any, total: Any, rate: Any, iteration: int,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        self._iteration = iteration
        if "lm loss" in losses:
            self._write("train", losses["lm loss"], learning_rate=rate)
        return original(losses, total, rate, iteration, *args, **kwargs)

    def evaluate(
        self, original: Callable[..., Any], forward_step: Any, samples: Any,
        *args: Any, eval_iters: int, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Join the samples: with `--full-validation` Megatron reads them one by one.

        It does so because a held-out set may end anywhere. Ours is made of whole micro-batches, so
        each evaluation still reads all of it, once, from its start.
        """
        from megatron.training import get_args

        size = get_args().eval_micro_batch_size
        batches, left = divmod(eval_iters, size)
        assert left == 0, f"micro-batches of {size} must divide a rank's {eval_iters} samples"
        samples = None if samples is None else joined(samples, size)
        losses, *rest = original(forward_step, samples, *args, eval_iters=batches, **kwargs)
        if losses and "lm loss" in losses:
            self._write("heldout", losses["lm loss"])
        return (losses, *rest)

    def _write(self, kind: str, loss: Any, **more: Any) -> None:
        """The last rank is on the last pipeline stage; the loss there is reduced over all ranks."""
        from megatron.training.utils import is_last_rank

        if is_last_rank():
            row = {"kind": kind, "iteration": self._iteration, "loss": float(loss), **more}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def joined(samples: Iterator[dict[str, Any]], size: int) -> Iterator[dict[str, Any]]:
    """Batches of several samples, from batches of one that never end."""
    while True:
        # Not islice: Megatron's iterator knows `next` and nothing else.
        group = [next(samples) for _ in range(size)]
        yield {key: torch.cat([sample[key] for sample in group]) for key in group[0]}


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
