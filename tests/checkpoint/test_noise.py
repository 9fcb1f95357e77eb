"""The noise: Philox against published vectors, streams against the definition, slices against the
whole."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_growth import GrowthConfig, GrowthStorageReader
from megatron_growth.checkpoint.noise import add_noise, normal_table, normals, philox, stream_key
from megatron_growth.planning.pieces import Box, Stream
from tests.checkpoint import bases, definition
from tests.checkpoint.loading import load_boxes

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
STREAM = Stream(1234, FC1, 3, 5)
TEXT = f'[1,1234,"{FC1}",3,5]'
ONES = 0xFFFFFFFF

# Random123 1.14, kat_vectors, philox4x32 10: counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_definitions_philox_gives_the_published_words(counter, key, words) -> None:
    assert definition.philox4x32_10(counter, key) == words


def test_philox_gives_the_published_words() -> None:
    assert philox(np.zeros(1, dtype=np.uint64), 0).tolist() == [list(KNOWN[0][2])]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), st.integers(0, 2**64 - 1))
def test_philox_equals_the_definition_for_any_counter_and_key(
    counters: list[int], key: int
) -> None:
    got = philox(np.array(counters, dtype=np.uint64), key)
    words = [
        definition.philox4x32_10((c & ONES, c >> 32, 0, 0), (key & ONES, key >> 32))
        for c in counters
    ]
    assert got.tolist() == [list(w) for w in words]


def test_the_table_is_the_definitions_quantiles_to_the_bit() -> None:
    want = np.array(definition.quantiles(), dtype=np.float64).astype(np.float32)
    assert normal_table().tobytes() == want.tobytes()
    assert np.array_equal(normal_table(), np.sort(normal_table()))
    assert abs(float(np.mean(normal_table().astype(np.float64) ** 2)) - 1) < 1e-7


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (STREAM, TEXT),
        (
            Stream(2**63 - 1, "mtp.layers.0.transformer_layer.mlp.router.weight", None, 0),
            f'[1,{2**63 - 1},"mtp.layers.0.transformer_layer.mlp.router.weight",null,0]',
        ),
    ],
)
def test_a_stream_equals_the_definition(stream: Stream, text: str) -> None:
    got = normals(stream_key(stream), 0, 100)
    assert got.dtype == np.float32
    assert got.tolist() == np.array(definition.normals(text, 100), dtype=np.float32).tolist()


def test_a_stream_is_what_it_was() -> None:
    """Pinned: another value is another STREAM_VERSION, and old manifests no longer remake their
    model."""
    assert stream_key(STREAM) == 0x6025BA489B42E562
    assert normals(stream_key(STREAM), 0, 3).tolist() == [
        -0.46122846007347107,
        -1.3956421613693237,
        0.07501824200153351,
    ]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3000), st.integers(1, 3000))
def test_any_slice_of_a_stream_equals_that_slice_of_the_whole(start: int, count: int) -> None:
    whole = normals(stream_key(STREAM), 0, start + count)
    assert np.array_equal(normals(stream_key(STREAM), start, count), whole[start:])


def test_a_stream_goes_on_beyond_2_to_the_35_elements() -> None:
    start = 2**35 - 5  # the counter's upper word turns there
    got = normals(stream_key(STREAM), start, 16)
    want = [normals(stream_key(STREAM), start + i, 1)[0] for i in range(16)]
    assert got.tolist() == want
    key = stream_key(STREAM)
    words = definition.philox4x32_10((0, 1, 0, 0), (key & ONES, key >> 32))
    assert got[5] == np.float32(definition.quantiles()[words[0] % 65536])


@st.composite
def _shape_and_box(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    low = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return shape, Box(
        low, tuple(draw(st.integers(1, n - a)) for n, a in zip(shape, low, strict=True))
    )


@settings(deadline=None, max_examples=80)
@given(_shape_and_box())
def test_noise_on_any_box_equals_that_box_of_the_noise_on_the_whole(shape_and_box) -> None:
    shape, box = shape_and_box
    whole = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
    where = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
    part = whole[where].clone(memory_format=torch.contiguous_format)
    add_noise(whole, box=Box((0,) * len(shape), shape), shape=shape, stream=STREAM, scale=0.37)
    add_noise(part, box=box, shape=shape, stream=STREAM, scale=0.37)
    assert torch.equal(part, whole[where])


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 6000))
def test_what_is_added_is_the_numpy_streams_values_times_the_scale(
    seed: int, start: int, count: int
) -> None:
    stream = Stream(seed, FC1, 3, 5)
    values = torch.linspace(-1, 1, count)
    want = values.numpy() + np.float32(0.37) * normals(stream_key(stream), start, count)
    box, shape = Box((start,), (count,)), (start + count,)
    add_noise(values, box=box, shape=shape, stream=stream, scale=0.37)
    assert np.array_equal(values.numpy(), want)


@pytest.mark.parametrize("columns", [(0, 1), (0, 8), (3, 9), (64, 64), (5, 2043), (1, 4095)])
def test_noise_on_columns_equals_those_of_the_whole(columns: tuple[int, int]) -> None:
    """As expert tensor parallelism cuts fc2: rows that begin anywhere within a counter, of any
    length."""
    shape, (first, num) = (6, 4096), columns
    whole, part = torch.zeros(shape), torch.zeros(6, num)
    add_noise(whole, box=Box((0, 0), shape), shape=shape, stream=STREAM, scale=1.0)
    add_noise(part, box=Box((0, first), (6, num)), shape=shape, stream=STREAM, scale=1.0)
    assert torch.equal(part, whole[:, first : first + num])
    assert torch.equal(whole.view(-1), torch.from_numpy(normals(stream_key(STREAM), 0, 6 * 4096)))


def test_drawing_does_not_hold_the_interpreters_lock() -> None:
    """So that threads draw side by side: another thread never waits as long as drawing takes."""
    values = torch.zeros(1 << 25)
    box, shape = Box((0,), (len(values),)), (len(values),)

    def draw() -> float:
        start = time.perf_counter()
        add_noise(values, box=box, shape=shape, stream=STREAM, scale=1.0)
        return time.perf_counter() - start

    def longest_wait() -> float:
        """The longest that this thread stood still while another drew, as a share of that."""
        with ThreadPoolExecutor(1) as pool:
            ticks, drawing = [time.perf_counter()], pool.submit(draw)
            while not drawing.done():
                ticks.append(time.perf_counter())
            ticks.append(time.perf_counter())
            return max(b - a for a, b in pairwise(ticks)) / drawing.result()

    draw()  # compiled
    assert min(longest_wait() for _ in range(5)) < 0.5  # a busy machine may be unfair at times


def test_noise_on_more_than_one_block_equals_the_definition_at_every_seam() -> None:
    count = 70_000  # blocks are of 2048
    values = torch.zeros(count)
    add_noise(values, box=Box((0,), (count,)), shape=(count,), stream=STREAM, scale=1.0)
    want = torch.tensor(definition.normals(TEXT, count))
    assert torch.equal(values, want)


def test_product_and_sum_are_rounded_separately() -> None:
    """A fused multiply-add would give other bits on machines that have one."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    grown = values.clone()
    add_noise(grown, box=Box((0,), (1000,)), shape=(1000,), stream=STREAM, scale=0.01)
    z = np.array(definition.normals(TEXT, 1000), dtype=np.float32)
    product = (np.float32(0.01) * z).astype(np.float32)
    assert np.array_equal(grown.numpy(), values.numpy() + product)
    fused = (values.double().numpy() + np.float64(np.float32(0.01)) * z.astype(np.float64)).astype(
        np.float32
    )
    assert not np.array_equal(grown.numpy(), fused)  # the values chosen do tell the two apart


# -- statistics

NUM = 1 << 20


def _sample(
    layer: int | None = 0, expert: int = 0, *, seed: int = 0, tensor: str = FC1
) -> np.ndarray:
    return normals(stream_key(Stream(seed, tensor, layer, expert)), 0, NUM).astype(np.float64)


def test_the_noise_is_normal() -> None:
    """Each bound is five standard errors of a million true normals."""
    z = _sample()
    error = 1 / np.sqrt(NUM)
    assert abs(z.mean()) < 5 * error
    assert abs(z.std() - 1) < 5 * error / np.sqrt(2)
    assert abs((z**3).mean()) < 5 * error * np.sqrt(15)
    assert abs((z**4).mean() - 3) < 0.001 + 5 * error * np.sqrt(
        96
    )  # the table ends at 4.3: kurtosis 2.999
    for bound, share in ((1, 0.6826895), (2, 0.9544997), (3, 0.9973002)):
        assert abs((np.abs(z) < bound).mean() - share) < 5 * error * np.sqrt(share * (1 - share))


@pytest.mark.parametrize(
    "other",
    [
        {"layer": 1},
        {"layer": None},
        {"expert": 1},
        {"seed": 1},
        {"tensor": "decoder.layers.mlp.experts.experts.linear_fc2.weight"},
    ],
)
def test_streams_that_differ_in_anything_are_uncorrelated(other: dict) -> None:
    one, two = _sample(), _sample(**other)
    assert abs((one * two).mean()) < 5 / np.sqrt(NUM)
    assert abs((one[1:] * two[:-1]).mean()) < 5 / np.sqrt(NUM)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 64])
def test_a_stream_is_uncorrelated_with_itself_further_on(lag: int) -> None:
    z = _sample()
    assert abs((z[lag:] * z[:-lag]).mean()) < 5 / np.sqrt(NUM)


def test_the_noise_of_a_grown_expert_has_the_asked_for_size(tmp_path: Path) -> None:
    weight = torch.randn(1, 1, 256, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    bases.save(tmp_path, {FC1: weight})
    growth = GrowthConfig.model_validate({"width": {"noise": {"experts": 0.05}}})
    (got,) = load_boxes(
        GrowthStorageReader(tmp_path, growth), [(FC1, (0, 0, 0, 0), (1, 2, 256, 128))]
    )
    noise = got[0, 1] - weight[0, 0]
    assert torch.equal(got[0, 0], weight[0, 0])
    assert abs(float(noise.std() / weight.std()) / 0.05 - 1) < 5 / (2 * weight.numel()) ** 0.5
