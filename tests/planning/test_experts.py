"""Width growth: which source expert each target expert is, and which clone of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_growth.planning.experts import ExpertMap

# order, factor: (source expert, clone index) of each target expert of a model of three experts
ORDERS = [
    ("interleave", 2, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]),
    ("interleave", 3, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]),
    ("append", 2, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]),
    ("append", 3, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2)]),
]


@pytest.mark.parametrize(("order", "factor", "expected"), ORDERS)
def test_clones_stand_where_the_order_says(
    order, factor: int, expected: list[tuple[int, int]]
) -> None:
    experts = ExpertMap(3, factor, order)
    assert experts.num_target == len(expected)
    assert [
        (experts.source(e), experts.clone_index(e)) for e in range(experts.num_target)
    ] == expected


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(["interleave", "append"]))
def test_targets_invert_the_map_and_the_original_comes_first(
    num_source: int, factor: int, order
) -> None:
    experts = ExpertMap(num_source, factor, order)
    for target in range(experts.num_target):
        assert experts.targets(experts.source(target))[experts.clone_index(target)] == target
    assert sorted(t for s in range(num_source) for t in experts.targets(s)) == list(
        range(num_source * factor)
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(2, 4))
def test_interleaved_clones_stay_on_the_expert_parallel_rank_of_their_original(
    ranks: int, experts_per_rank: int, factor: int
) -> None:
    experts = ExpertMap(ranks * experts_per_rank, factor, "interleave")
    for target in range(experts.num_target):
        rank_of_clone = target // (experts_per_rank * factor)
        assert rank_of_clone == experts.source(target) // experts_per_rank


def test_only_a_factor_of_one_is_no_growth() -> None:
    assert ExpertMap(4, 1, "interleave").is_identity
    assert ExpertMap(0, 1, "interleave").is_identity
    assert not ExpertMap(4, 2, "append").is_identity
