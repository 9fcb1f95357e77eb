"""Megatron's RNG tracker steers the CPU generator.

``core/tensor_parallel/random.py`` keeps named CUDA generator states (model parallel, data parallel,
expert parallel) and swaps them in and out. Without CUDA its setter queues the change for a device
that never comes (``_set_cuda_rng_state``, line 174). If only the seeding were redirected, the CPU
generator would stay where the last seeding put it, at the *expert* seed: with EP > 1 the dense
weights would differ between data-parallel ranks, training would go wrong without a word, and
dropout would not be restored on resuming.

Here there is one generator, and the tracker swaps its states as it would on a GPU.
"""

import logging

import megatron.core.tensor_parallel.random as tracker
import torch

from megatron_growth.training.substitutions import Substitutions


def _get_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False):
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _seed(seed: int) -> None:
    # Not torch.manual_seed(), which seeds every device and so would come back here.
    torch.default_generator.manual_seed(seed)


def _seed_all(seed: int) -> None:
    _seed(seed)


# What Megatron calls by these names: the tracker (random.py 390, 417), and the saving and loading
# of RNG state in a checkpoint (training/checkpointing.py 417 and 2665).
_TORCH_CUDA: dict[str, object] = {
    "get_rng_state": _get_state,
    "set_rng_state": _set_state,
    "manual_seed": _seed,
    "manual_seed_all": _seed_all,
}


def substitute(substitutions: Substitutions) -> None:
    substitutions.replace(tracker, "_get_cuda_rng_state", _get_state)
    substitutions.replace(tracker, "_set_cuda_rng_state", _set_state)
    substitutions.replace_all(torch.cuda, _TORCH_CUDA)
    substitutions.replace_all(torch.cuda.random, _TORCH_CUDA)
    # fork() warns when the CPU generator moves inside it (random.py 333). Here that is the point.
    logging.getLogger(tracker.__name__).addFilter(_not_about_the_cpu_generator)


def _not_about_the_cpu_generator(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()
