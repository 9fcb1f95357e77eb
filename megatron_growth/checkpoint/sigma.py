"""The standard deviation of a tensor, exactly the same however the tensor is cut into chunks.

Floating-point sums depend on their order, and the order on how the base was sharded; noise scaled
by such a sigma would differ in its last bits between layouts. So the values are first put on a
grid, 2^-16 of the power of two above the largest magnitude, which makes them integers of at most 17
bits. Their sums and sums of squares are integers too, exact in fp64 for a block and in Python's
integers beyond. The grid moves sigma by some 1e-6 of itself, unless single outliers are more than a
hundred times larger than sigma.
"""

import math
from collections.abc import Sequence

import torch

_GRID_BITS = 16
_BLOCK = 1 << 19  # 2^19 squares of 2^32 stay below 2^53, where fp64 counts exactly


def standard_deviation(chunks: Sequence[torch.Tensor]) -> float:
    """Sample standard deviation (n - 1, as `torch.std`) of all elements of `chunks` together.

    Args:
        chunks: floating-point CPU tensors of any shape, no element twice.

    Returns:
        A double, the same for every chunking; 0 for fewer than two elements; nan where a value is
        not finite.
    """
    magnitudes = [float(chunk.abs().max()) for chunk in chunks if chunk.numel()]
    if not all(map(math.isfinite, magnitudes)):  # before max(), which may pass a nan over
        return math.nan
    largest = max(magnitudes, default=0.0)
    count = sum(chunk.numel() for chunk in chunks)
    if largest == 0.0 or count < 2:
        return 0.0
    exponent = math.frexp(largest)[1] - _GRID_BITS
    total = squares = 0
    for chunk in chunks:
        for block in chunk.reshape(-1).split(_BLOCK):
            on_grid = (block.double() * math.ldexp(1.0, -exponent)).round_()
            total += int(on_grid.sum())
            squares += int(on_grid.dot(on_grid))
    variance = (count * squares - total * total) / (count * (count - 1))
    return math.ldexp(math.sqrt(variance), exponent)
