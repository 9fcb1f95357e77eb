"""The standard deviation: close to torch's, and the same bits for every order and chunking."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_growth.checkpoint.sigma import standard_deviation
from tests.checkpoint import definition


def _heavy_tailed(n: int, generator: torch.Generator) -> torch.Tensor:
    """Student's t with three degrees of freedom: outliers dozens of sigma out."""
    z = torch.randn(4, n, generator=generator)
    return z[0] / (z[1:].square().mean(0)).sqrt()


SAMPLES = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "normal of a weight's size": lambda n, g: torch.randn(n, generator=g) * 0.02,
    "bf16": lambda n, g: (torch.randn(n, generator=g) * 0.02).bfloat16(),
    "fp16": lambda n, g: torch.randn(n, generator=g).half(),
    "heavy-tailed": _heavy_tailed,
    "uniform, far from zero": lambda n, g: torch.rand(n, generator=g) + 10,
    "tiny": lambda n, g: torch.randn(n, generator=g) * 1e-36,
    "subnormal": lambda n, g: torch.randn(n, generator=g) * 1e-40,
    "huge": lambda n, g: torch.randn(n, generator=g) * 1e37,
    "one outlier": lambda n, g: torch.cat([torch.randn(n - 1, generator=g), torch.tensor([100.0])]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_it_is_the_standard_deviation(name: str) -> None:
    values = SAMPLES[name](100_000, torch.Generator().manual_seed(0))
    exact = float(values.double().std())
    assert abs(standard_deviation([values]) / exact - 1) < 2e-6


@pytest.mark.parametrize("name", SAMPLES)
def test_it_equals_the_definition_in_fractions_to_the_bit(name: str) -> None:
    values = SAMPLES[name](300, torch.Generator().manual_seed(1))
    assert standard_deviation([values]) == definition.sigma(values)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_neither_the_order_nor_the_chunks_change_a_bit(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SAMPLES)))
    values = SAMPLES[name](
        data.draw(st.integers(2, 400)), torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    )
    order = torch.randperm(
        len(values), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=6)))
    chunks = [*torch.tensor_split(values[order], cuts)]
    assert standard_deviation(chunks) == standard_deviation([values])


def test_blocks_of_one_chunk_do_not_change_a_bit() -> None:
    values = torch.randn((1 << 20) + 17, generator=torch.Generator().manual_seed(2))
    assert standard_deviation([values]) == standard_deviation([*values.split(99_991)])


def test_a_chunk_may_be_a_strided_view() -> None:
    values = torch.randn(30, 40, generator=torch.Generator().manual_seed(3))
    assert standard_deviation([values[:, :7], values[:, 7:]]) == standard_deviation([values])


def test_values_are_not_changed() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(4))
    before = values.clone()
    standard_deviation([values])
    assert torch.equal(values, before)


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [torch.zeros(0)],
        [torch.tensor([3.0])],
        [torch.tensor([3.0]), torch.zeros(0)],
        [torch.zeros(5), torch.zeros(3)],
    ],
)
def test_nothing_to_spread_has_no_spread(chunks: list[torch.Tensor]) -> None:
    assert standard_deviation(chunks) == 0.0


def test_equal_values_have_none_either() -> None:
    assert standard_deviation([torch.full((7,), 0.3), torch.full((5,), 0.3)]) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("others", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_value_that_is_not_finite_shows_in_whichever_chunk_it_is(
    value: float, others: float, place: int
) -> None:
    chunks = [torch.full((4,), others) for _ in range(3)]
    chunks[place][-1] = value
    assert math.isnan(standard_deviation(chunks))
