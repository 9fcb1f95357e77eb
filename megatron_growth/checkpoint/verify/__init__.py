"""Does a grown checkpoint hold exactly what the plan says? Answered by another route than growth
takes.

Growth asks, for a box of the target, where it comes from. Verification asks, for each layer and
expert of the base, what must have become of it, and works out every target value again from the
definition. It shares with growth what the definition itself is made of: the key grammar's splitting
of keys, the layer and expert maps, the raw noise stream. Of all else it has its own: boxes, chunks
and transforms, sigma, which tensors are cloned, noisy or zeroed. So a mistake in either shows.

    definition.py   the definition: which targets a part of the base has, and their values
    values.py       sigma and noise
    problem.py      one thing that is wrong
    stored.py       a checkpoint's tensors and objects through a DCP reader, one part at a time
    tensors.py      every tensor, bit for bit
    objects.py      every object
    common_state.py the arguments that describe the grown model
    provenance.py   the manifest against the base
    verification.py all of it, in order, and what came of it
"""

from megatron_growth.checkpoint.verify.problem import Problem
from megatron_growth.checkpoint.verify.verification import Verification, verify

__all__ = ["Problem", "Verification", "verify"]
