"""The demo's training script, as a user has one: Megatron's `pretrain()` on a GPT model.

It knows nothing of growth. Base and scratch are started with

    torchrun ... -m megatron_growth.demo.train <arguments>

and the grown model, by the same script unchanged, with

    torchrun ... -m megatron_growth.run .../demo/train.py --growth-config FILE <arguments>

Two options are its own: where to record the losses, and at which training sample to begin.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_growth.training import cpu_backend, fused_adam
from megatron_growth.training.entry import one_line_errors


def main() -> None:
    """Run this rank."""
    words = sys.argv[1:]
    if cpu_backend.needed():
        # Before megatron is imported. Under megatron_growth.run both have been done already.
        cpu_backend.install()
        words += cpu_backend.arguments(words)

    from megatron_growth.demo.recorder import recording
    from megatron_growth.training import gpt

    own, _ = _add_options(argparse.ArgumentParser(allow_abbrev=False)).parse_known_args(words)
    fused = fused_adam.where_missing()
    with one_line_errors(), fused, recording(own.record), _first_sample(own.first_sample):
        gpt.run(words, extra_args_provider=_add_options)


def _add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("demo")
    group.add_argument("--record", type=Path, help="File to append the losses to.")
    group.add_argument("--first-sample", type=int, default=0, help="Training samples to pass over.")
    return parser


@contextmanager
def _first_sample(number: int) -> Iterator[None]:
    """Begin at that sample of the training data.

    Megatron counts the samples that a run has consumed, and no option sets the count. It reads it
    once the model is set up (training/training.py 4523 in 0.19.2).
    """
    from megatron.training import get_args, training

    original = training.setup_model_and_optimizer

    def setup(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        get_args().consumed_train_samples += number
        return result

    training.setup_model_and_optimizer = setup
    try:
        yield
    finally:
        training.setup_model_and_optimizer = original


if __name__ == "__main__":
    main()
