"""The garbage collector, off while metadata is built.

Metadata of a large model is millions of small objects, none of them garbage. The collector walks
all of them again and again as they are made, which takes several times longer than making them, and
thrice more once it is on again, as what is new grows old.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection inside; as before after, with all that was made as old as can be."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation, without a walk
        if was_on:
            gc.enable()
