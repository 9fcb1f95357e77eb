"""Gaussian noise as a pure function of what it is added to.

Each element's noise depends on its stream (seed, logical tensor, target layer, target expert) and
its index in that (layer, expert) tensor, and on nothing else: any box, asked for in any order, on
any layout, gets the same bits.

    key      64 bits: BLAKE2b of the stream
    counter  element index // 8
    words    Philox4x32-10 (Salmon et al., SC 2011): four words a counter, eight 16-bit indices
    z  table[index], 65536 midpoint quantiles of the normal distribution, scaled to variance 1, fp32
    clone    fp32(source) + fp32(alpha * sigma) * z, product and sum rounded separately

Integers, one look-up, one multiply, one add: no libm, so the bits are the same on every machine.
`STREAM_VERSION` changes whenever any of this does; manifests record it.
"""

import hashlib
import json
import math
from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_growth.errors import GrowthError
from megatron_growth.planning.plan import Box, Stream

STREAM_VERSION = 1

_TABLE_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
_PER_COUNTER = 8  # four words, two 16-bit indices each
_BLOCK = 1 << 16  # elements at a time: the working arrays stay in cache
_LOW = np.uint64(0xFFFFFFFF)
_HIGH_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def stream_key(stream: Stream) -> int:
    """The 64-bit Philox key of a stream."""
    name = json.dumps(
        [STREAM_VERSION, stream.seed, stream.tensor, stream.layer, stream.expert],
        separators=(",", ":"),
    )
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@cache
def normal_table() -> NDArray[np.float32]:
    """The 65536 quantiles, fp32, read-only. Their hash is checked: another value would be another
    stream."""
    size = 1 << 16
    normal = NormalDist()
    upper = [normal.inv_cdf((i + 0.5) / size) for i in range(size // 2, size)]
    scale = math.sqrt(math.fsum(z * z for z in upper) / (size // 2))
    half = (np.array(upper, dtype=np.float64) / scale).astype(np.float32)
    table = np.concatenate([-half[::-1], half])
    digest = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    if digest != _TABLE_SHA256:
        raise GrowthError(
            f"the table of normal quantiles hashes to {digest[:16]}, not {_TABLE_SHA256[:16]}: "
            "this machine's libm rounds differently and would draw other noise; please report the "
            "machine, and grow on another"
        )
    table.setflags(write=False)
    return table


def philox(counters: NDArray[np.uint64], key: int) -> NDArray[np.uint32]:
    """Philox4x32-10 of 128-bit counters whose upper 64 bits are zero.

    Args:
        counters: lower 64 bits, shape [n].
        key: 64 bits.

    Returns:
        Words, shape [n, 4].
    """
    x0, x1 = counters & _LOW, counters >> _HIGH_SHIFT
    x2, x3 = np.zeros_like(x0), np.zeros_like(x0)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(_ROUNDS):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = (p1 >> _HIGH_SHIFT) ^ x1 ^ np.uint64(k0), p1 & _LOW
        x2, x3 = (p0 >> _HIGH_SHIFT) ^ x3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def normals(key: int, start: int, count: int) -> NDArray[np.float32]:
    """Elements `start` to `start + count` of a stream's normals, shape [count]."""
    first, last = start // _PER_COUNTER, -(-(start + count) // _PER_COUNTER)
    words = philox(np.arange(first, last, dtype=np.uint64), key)
    indices = words.astype("<u4", copy=False).view("<u2").reshape(-1)
    skip = start - first * _PER_COUNTER
    return np.take(normal_table(), indices[skip : skip + count])


def add_noise(
    values: torch.Tensor, *, box: Box, shape: tuple[int, ...], stream: Stream, scale: float
) -> None:
    """Add a clone's noise, in place.

    Args:
        values: fp32, contiguous, CPU; the box's source values, shape `box.sizes`.
        box: which box of the (layer, expert) tensor they are.
        shape: that tensor's global shape.
        stream: the clone's stream.
        scale: alpha * sigma.
    """
    key, factor = stream_key(stream), np.float32(scale)
    flat = values.view(-1).numpy()
    position = 0
    for start, count in _runs(box, shape):
        for at in range(0, count, _BLOCK):
            n = min(_BLOCK, count - at)
            flat[position : position + n] += factor * normals(key, start + at, n)
            position += n


def _runs(box: Box, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The box's elements as runs (first index, count) of the row-major tensor, in order."""
    axis = len(shape)
    while axis > 0 and box.sizes[axis - 1] == shape[axis - 1]:
        axis -= 1
    axis = max(axis - 1, 0)  # the first axis whose sub-boxes are contiguous
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if not shape:
        return [(0, 1)]
    run = box.sizes[axis] * strides[axis]
    starts = [box.offsets[axis] * strides[axis]]
    for i in reversed(range(axis)):
        starts = [
            (box.offsets[i] + j) * strides[i] + s for j in range(box.sizes[i]) for s in starts
        ]
    return [(start, run) for start in starts]
