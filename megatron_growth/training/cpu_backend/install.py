"""Decides whether the CPU backend is needed, and installs all of it or none."""

import functools
import sys
import warnings

import torch

from megatron_growth.errors import ConfigError
from megatron_growth.training.substitutions import Substitutions


def needed() -> bool:
    """True when this process sees no CUDA device; the same before and after ``install()``."""
    return not torch.cuda.is_available()


@functools.cache  # A second call finds the first one's result; a failed call is tried again.
def install() -> None:
    """Make Megatron run on CPU for the rest of this process. Call it before importing megatron.

    Calling it again, or where there is a GPU, does nothing. If any name to be replaced is missing
    upstream, everything replaced so far is put back before the error leaves.
    """
    if not needed():
        return
    if "megatron.core.jit" in sys.modules:
        raise ConfigError(
            "cpu_backend.install() came after megatron was imported, when its functions were "
            "already handed to torch.compile; call install() before the first megatron import"
        )
    with Substitutions() as substitutions:
        _before_megatron_is_imported(substitutions)
        _after_megatron_is_imported(substitutions)


def _before_megatron_is_imported(substitutions: Substitutions) -> None:
    from megatron_growth.training.cpu_backend import collectives, device, startup

    device.substitute(substitutions)
    collectives.substitute(substitutions)
    startup.substitute_before_import(substitutions)


def _after_megatron_is_imported(substitutions: Substitutions) -> None:
    with warnings.catch_warnings():
        # A dozen modules say that they fall back to plain PyTorch. Here that is what is wanted.
        warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
        warnings.filterwarnings("ignore", message=".*transformer-engine>=")
        # Imported here: these import megatron at their top.
        from megatron_growth.training import fused_adam
        from megatron_growth.training.cpu_backend import model, random_state, startup

        random_state.substitute(substitutions)
        fused_adam.substitute(substitutions)
        model.substitute(substitutions)
        startup.substitute_after_import(substitutions)
