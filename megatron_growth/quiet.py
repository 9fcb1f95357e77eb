"""Silence for what torch and Megatron say while they are imported: no CUDA, no Apex, fallbacks.

A command that only reads files, or writes a dataset, needs none of what they miss.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No warning and no log below an error inside; as before after."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
