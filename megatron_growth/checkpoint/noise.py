"""Gaussian noise as a pure function of what it is added to.

Each element's noise depends on its stream (seed, logical tensor, target layer, target expert) and
its index in that (layer, expert) tensor, and on nothing else: any box, asked for in any order, on
any layout, gets the same bits.

    key      64 bits: BLAKE2b of the stream
    counter  element index // 8
    words    Philox4x32-10 (Salmon et al., SC 2011): four words a counter, eight 16-bit indices
    z        table[index], 65536 midpoint quantiles of N(0, 1), scaled to variance 1, fp32
    clone    fp32(source) + fp32(alpha * sigma) * z, product and sum rounded separately

Integers, one look-up, one multiply, one add: no libm, so the bits are the same on every machine.
`STREAM_VERSION` changes whenever any of this does; manifests record it.

It stands here twice. `normals` is the definition in numpy, and what verification draws from.
`add_noise`, what growth runs, is the same compiled by numba: four times as fast, without the
interpreter's lock, and no slower on the short rows of a tensor cut along its columns.
"""

import hashlib
import json
import math
from functools import cache
from statistics import NormalDist

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from megatron_growth.errors import GrowthError
from megatron_growth.planning.pieces import Box, Stream

STREAM_VERSION = 1

_TABLE_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
_PER_COUNTER = 8  # four words, two 16-bit indices each
_BLOCK = 256  # counters at a time: their words stay in the first-level cache
_LOW = np.uint64(0xFFFFFFFF)
_HIGH_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
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
    k0, k1 = np.uint64(key) & _LOW, np.uint64(key) >> _HIGH_SHIFT
    for _ in range(_ROUNDS):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = (p1 >> _HIGH_SHIFT) ^ x1 ^ k0, p1 & _LOW
        x2, x3 = (p0 >> _HIGH_SHIFT) ^ x3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
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
    starts, run = _runs(box, shape)
    # Products are rounded here, once for each of the table's entries, so that below there is only a
    # sum: no compiler can contract the two into one rounding, on whatever machine.
    products = np.float32(scale) * normal_table()
    _add(values.view(-1).numpy(), starts, run, np.uint64(stream_key(stream)), products)


def _runs(box: Box, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], int]:
    """The box's elements as runs of the row-major tensor, in order: the first index of each, and
    how many elements each has."""
    axis = len(shape)
    while axis > 0 and box.sizes[axis - 1] == shape[axis - 1]:
        axis -= 1
    axis = max(axis - 1, 0)  # the first axis whose sub-boxes are contiguous
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    starts = np.array([math.sumprod(box.offsets, strides)], dtype=np.int64)
    for size, stride in zip(box.sizes[:axis], strides[:axis], strict=True):
        starts = np.add.outer(starts, np.arange(size) * stride).reshape(-1)
    return starts, math.prod(box.sizes[axis:])


# -- compiled


@numba.njit(nogil=True)
def _add(
    values: NDArray[np.float32],
    starts: NDArray[np.int64],
    run: int,
    key: np.uint64,
    products: NDArray[np.float32],
) -> None:
    """Add to `values`, run after run, the product that the stream draws for each element."""
    words = np.empty((4, _BLOCK), dtype=np.uint32)
    position = 0
    for start in starts:
        index, end = start, start + run
        while index < end:
            first = index // _PER_COUNTER
            count = min(_BLOCK, (end - 1) // _PER_COUNTER + 1 - first)
            _philox_block(words, first, count, key)
            begin = first * _PER_COUNTER
            stop = min(end, begin + count * _PER_COUNTER)
            if index == begin and stop == begin + count * _PER_COUNTER:
                for counter in range(count):
                    for word in range(4):
                        pair = words[word, counter]
                        values[position] += products[pair & 0xFFFF]
                        values[position + 1] += products[pair >> 16]
                        position += 2
            else:  # a run that begins or ends within a counter
                for i in range(index - begin, stop - begin):
                    pair = words[i // 2 % 4, i // _PER_COUNTER]
                    values[position] += products[pair >> (i % 2 * 16) & 0xFFFF]
                    position += 1
            index = stop


@numba.njit(nogil=True)
def _philox_block(words: NDArray[np.uint32], first: int, count: int, key: np.uint64) -> None:
    """`philox` of counters `first` to `first + count`, a row of `words` for each of the four."""
    for i in range(count):
        counter = np.uint64(first + i)
        x0, x1, x2, x3 = counter & _LOW, counter >> _HIGH_SHIFT, np.uint64(0), np.uint64(0)
        k0, k1 = key & _LOW, key >> _HIGH_SHIFT
        for _ in range(_ROUNDS):
            p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
            x0, x1 = (p1 >> _HIGH_SHIFT) ^ x1 ^ k0, p1 & _LOW
            x2, x3 = (p0 >> _HIGH_SHIFT) ^ x3 ^ k1, p0 & _LOW
            k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
        words[0, i], words[1, i], words[2, i], words[3, i] = x0, x1, x2, x3
