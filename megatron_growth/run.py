"""`torchrun ... -m megatron_growth.run their_pretrain.py --growth-config FILE <their arguments>`.

For people with a training script of their own: it runs unchanged, as `__main__`, with the grown
model's arguments on its command line, and Megatron's loader inside it reads the grown view.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_growth.errors import ConfigError
from megatron_growth.training.entry import one_line_errors, train


def main(argv: Sequence[str] | None = None) -> None:
    """Run this rank."""
    words = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors():
        if not words or not Path(words[0]).is_file():
            raise ConfigError(
                f"{words[0] if words else 'nothing'!r} is no training script; "
                "give its path first: -m megatron_growth.run their_pretrain.py --growth-config "
                "FILE ..."
            )
        script = words[0]
        train(words[1:], lambda arguments: _run_script(script, arguments))


def _run_script(script: str, words: list[str]) -> None:
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
