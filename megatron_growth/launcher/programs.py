"""Programs of the cluster, run for their answer."""

import os
import subprocess
from collections.abc import Sequence

from megatron_growth.errors import GrowthError


def answer(words: Sequence[str]) -> str:
    """What a command prints.

    Raises:
        GrowthError: it is not there, or failed.
    """
    try:
        done = subprocess.run(
            list(words), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise GrowthError(
            f"{words[0]!r} is not on this machine; submit from one that has it "
            f"({os.uname().nodename!r} has not)"
        ) from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise GrowthError(f"{' '.join(words)} failed with exit code {done.returncode}: {said}")
    return done.stdout
