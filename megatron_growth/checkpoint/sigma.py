"""The standard deviation of a tensor, exactly the same however the tensor is cut into chunks.

Floating-point sums depend on their order, and the order on how the base was sharded; noise scaled
by such a sigma would differ in its last bits between layouts. So the values are first put on a
grid, 2^-16 of the power of two above the largest magnitude, which makes them integers of at most 17
bits. Their sums and sums of squares are integers too, of 64 bits for a block and Python's beyond.
The grid moves sigma by some 1e-6 of itself, unless single outliers are more than a hundred times
larger than sigma.

Two passes, both over blocks that stay in cache: one for the largest magnitude, one for the sums.
"""

import math
from collections.abc import Iterator, Sequence

import numba
import numpy as np
import torch
from numpy.typing import NDArray

_GRID_BITS = 16
_BLOCK = 1 << 15  # 2^15 squares of 2^32 stay below 2^63; torch copies no more in one thread
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a value


def standard_deviation(chunks: Sequence[torch.Tensor]) -> float:
    """Sample standard deviation (n - 1, as `torch.std`) of all elements of `chunks` together.

    Args:
        chunks: floating-point CPU tensors of any shape, no element twice.

    Returns:
        A double, the same for every chunking; 0 for fewer than two elements; nan where a value is
        not finite.
    """
    flat = [chunk.reshape(-1) for chunk in chunks if chunk.numel()]
    magnitudes = [_largest(chunk) for chunk in flat]
    if not all(map(math.isfinite, magnitudes)):  # before max(), which may pass a nan over
        return math.nan
    largest = max(magnitudes, default=0.0)
    count = sum(chunk.numel() for chunk in flat)
    if largest == 0.0 or count < 2:
        return 0.0
    exponent = math.frexp(largest)[1] - _GRID_BITS
    total = squares = 0
    for chunk in flat:
        for values in _blocks(chunk):
            more = _sums(values, math.ldexp(1.0, -exponent))
            total, squares = total + more[0], squares + more[1]
    variance = (count * squares - total * total) / (count * (count - 1))
    return math.ldexp(math.sqrt(variance), exponent)


def _largest(chunk: torch.Tensor) -> float:
    """The largest magnitude; inf or nan where a value is. Without their signs, floats are in the
    order of their bits, and those compare faster: nan last, behind inf."""
    as_integers = chunk.view(_BITS[chunk.itemsize])
    bits, magnitude = as_integers.numpy(), torch.iinfo(as_integers.dtype).max
    largest = max((bits[i : i + _BLOCK] & magnitude).max() for i in range(0, len(bits), _BLOCK))
    return float(torch.tensor(largest, dtype=as_integers.dtype).view(chunk.dtype))


def _blocks(chunk: torch.Tensor) -> Iterator[NDArray[np.floating]]:
    """The values, a block at a time, exactly, in a type that numpy has."""
    if chunk.dtype in (torch.float32, torch.float64):
        values = chunk.numpy()
        yield from (values[i : i + _BLOCK] for i in range(0, len(values), _BLOCK))
    else:
        buffer = torch.empty(_BLOCK)
        for block in chunk.split(_BLOCK):
            yield buffer[: len(block)].copy_(block).numpy()


@numba.njit(nogil=True)
def _sums(values: NDArray[np.floating], scale: float) -> tuple[int, int]:
    """Sum and sum of squares of the values on the grid. Integers, so that the loop may be
    vectorized: the order cannot matter."""
    total = squares = np.int64(0)
    for value in values:
        on_grid = np.int64(np.rint(np.float64(value) * scale))
        total += on_grid
        squares += on_grid * on_grid
    return total, squares
