"""Megatron's own training loop on CPU: several processes, gloo, no GPU.

Megatron's code assumes CUDA, NCCL and the fused kernels of Apex or Transformer Engine. Nothing of
it is copied or edited here. Instead the few names through which those assumptions enter are
replaced while the process runs, one idea per file, each beside the upstream line it stands for
(paths are relative to the installed ``megatron/`` folder of 0.19.2):

==================  ==============================================================================
``device.py``       ``cuda`` means ``cpu``; streams, events and memory queries are inert
``random_state.py`` Megatron's RNG tracker steers the CPU generator
``collectives.py``  what NCCL accepts and gloo does not
``model.py``        the plain modules of the local layer spec under sequence parallelism and MLA
``startup.py``      no GPU assertion, no kernel compilation, no helper process per checkpoint
``flags.py``        the command-line arguments that go with all this
==================  ==============================================================================

To these comes ``training/fused_adam.py``, a fused Adam, so that the distributed optimizer takes its
production branch; it serves CUDA machines too.

With a CUDA device none of it is active: ``needed()`` is False and ``install()`` does nothing.
``install()`` must run before anything imports megatron, because megatron decorates its fused
functions with ``torch.compile`` while it is being imported.
"""

from megatron_growth.training.cpu_backend.flags import arguments
from megatron_growth.training.cpu_backend.install import install, needed

__all__ = ["arguments", "install", "needed"]
