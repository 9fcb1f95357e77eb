"""No GPU assertion, no kernel compilation at start-up, no helper process per checkpoint."""

import functools
import queue
from collections.abc import Callable

import torch

from megatron_growth.training.substitutions import Substitutions


def compile_nothing(
    function: Callable[..., object] | None = None, **kwargs: object
) -> Callable[..., object]:
    """``torch.compile`` that returns the function, used bare or with options."""
    return _identity if function is None else function


def _identity(function: Callable[..., object]) -> Callable[..., object]:
    return function


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def substitute_before_import(substitutions: Substitutions) -> None:
    # core/jit.py 21 decorates the fused functions with it. Compiling them takes 5 to 20 s per start
    # and gains nothing at the sizes one trains on a CPU.
    substitutions.replace(torch, "compile", compile_nothing)


def substitute_after_import(substitutions: Substitutions) -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer
    import megatron.training.training as training

    # training/initialize.py 66 asserts a GPU unless told otherwise; pretrain() cannot tell it.
    allow_no_cuda = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    substitutions.replace(training, "initialize_megatron", allow_no_cuda)
    # training/training.py 1117 warms up the functions that are not compiled any more.
    substitutions.replace(training, "set_jit_fusion_options", _nothing)
    queue_for = functools.partial(write_results_queue, writer, writer.get_write_results_queue)
    substitutions.replace(writer, "get_write_results_queue", queue_for)


def write_results_queue(writer: object, original: Callable[..., object], mp_mode: str = "spawn"):
    """The queue through which the threads that write a checkpoint report back.

    ``core/dist_checkpointing/strategies/filesystem_async.py`` 65 makes one that other processes can
    reach, by starting a process per rank which imports torch and megatron again: 6 to 18 s per
    save. A synchronous save has no other process. An asynchronous one has made its queue beforehand
    (``training/async_utils.py`` 104, with ``fork``) and keeps it.
    """
    if mp_mode == "spawn" and writer._results_queue is None:  # type: ignore[attr-defined]
        return queue.Queue()
    return original(mp_mode)
