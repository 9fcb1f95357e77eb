"""The `megatron-growth` command, a skin over the library: a file for each command."""

from megatron_growth.cli.app import main

__all__ = ["main"]
