"""sigma and noise, the plain way: whole tensors, a block at a time.

sigma is the sample standard deviation of values on a grid of 2^-16 of the power of two above the
largest. z is the documented stream of checkpoint/noise.py, from its first element on.
"""

import math

import numpy as np
import torch

from megatron_growth.checkpoint.noise import normals

_BLOCK = 1 << 20  # elements at a time, so that fp64 copies stay small


def standard_deviation(values: torch.Tensor) -> float:
    """Sample standard deviation of the values on their grid, by exact integer sums.

    Raises:
        ValueError: one is not finite; the message goes on from the tensor's name.
    """
    flat = values.reshape(-1)
    count = flat.numel()
    largest = float(flat.abs().max())
    if not math.isfinite(largest):
        raise ValueError(
            "has values that are not finite, so its clones' noise has no scale; the base has "
            "diverged"
        )
    if largest == 0 or count < 2:
        return 0.0
    step = math.frexp(largest)[1] - 16
    total = squares = 0
    for start in range(0, count, _BLOCK):
        grid = np.rint(np.ldexp(flat[start : start + _BLOCK].double().numpy(), -step)).astype(
            np.int64
        )
        total += int(grid.sum())
        squares += int((grid * grid).sum())
    return math.ldexp(math.sqrt((count * squares - total**2) / (count * (count - 1))), step)


def noisy(exact: torch.Tensor, key: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """fp32(exact) + fp32(scale) * z, rounded to `dtype`.

    Args:
        exact: one whole (layer, expert) tensor.
        key: of the stream that z is.
        scale: alpha * sigma.
        dtype: of the result.
    """
    flat = exact.reshape(-1)
    grown = torch.empty(flat.shape, dtype=dtype)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK].float()
        noise = torch.from_numpy(np.float32(scale) * normals(key, start, block.numel()))
        grown[start : start + _BLOCK] = (block + noise).to(dtype)
    return grown.view(exact.shape)
