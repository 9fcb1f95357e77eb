"""`torchrun ... -m megatron_growth.pretrain --growth-config FILE --load BASE --save RUN <Megatron
arguments>`.

Trains a GPT model with Megatron's own `pretrain()`, grown from BASE at the first start and resumed
from RUN after.
"""

import sys
from collections.abc import Sequence

from megatron_growth.training.entry import one_line_errors, train


def main(argv: Sequence[str] | None = None) -> None:
    """Run this rank."""
    with one_line_errors():
        train(sys.argv[1:] if argv is None else argv, _pretrain)


def _pretrain(words: list[str]) -> None:
    from megatron_growth.training import gpt  # imports megatron, which the CPU backend must precede

    gpt.run(words)


if __name__ == "__main__":
    main()
