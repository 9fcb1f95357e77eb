"""`torchrun ... -m megatron_growth.train <Megatron arguments>`.

Trains a GPT model with Megatron's own `pretrain()`, from random weights or from its `--load`.
Nothing is grown; it is here so that a base is trained by the same code as what it grows into.
"""

import sys
from collections.abc import Sequence

from megatron_growth.training import cpu_backend
from megatron_growth.training.entry import one_line_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Run this rank."""
    words = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors():
        if cpu_backend.needed():
            cpu_backend.install()  # before megatron is imported
            words += cpu_backend.arguments(words)
        from megatron_growth.training import gpt

        gpt.run(words)


if __name__ == "__main__":
    main()
