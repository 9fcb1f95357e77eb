"""`torchrun --nproc-per-node N -m megatron_growth.reshard --load BASE --save NEW`.

Saves BASE again with optimizer state that can be grown, on as many ranks as BASE was trained on
(fewer data-parallel ones will do). BASE is left as it is.
"""

import sys
from collections.abc import Sequence

from megatron_growth.training import cpu_backend, fused_adam
from megatron_growth.training.entry import one_line_errors, say
from megatron_growth.training.reshard import parse, reshard_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run this rank."""
    own, extra = parse(list(sys.argv[1:] if argv is None else argv))
    with one_line_errors():
        cpu_backend.install()
        words = reshard_arguments(own.load, own.save, [*extra, *cpu_backend.arguments(extra)])
        from megatron_growth.training import (
            gpt,
        )  # imports megatron, which the CPU backend must precede

        with fused_adam.where_missing():
            gpt.run(words)
        say(f"{own.save} holds {own.load} with fully reshardable optimizer state")


if __name__ == "__main__":
    main()
