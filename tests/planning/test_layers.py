"""Depth growth: which source layer each target layer is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_growth.errors import PlanError
from megatron_growth.planning.layers import LayerMap, explicit, identity, interposition, stacking


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    """Source layers, skipped ends and a larger target."""
    num_layers = draw(st.integers(1, 12))
    skip_first = draw(st.integers(0, num_layers - 1))
    skip_last = draw(st.integers(0, num_layers - 1 - skip_first))
    target = draw(st.integers(num_layers + 1, 5 * num_layers))
    return {
        "num_layers": num_layers,
        "target": target,
        "skip_first": skip_first,
        "skip_last": skip_last,
    }


def _make(make, size: dict[str, int]) -> LayerMap:
    return make(
        size["num_layers"], **{name: value for name, value in size.items() if name != "num_layers"}
    )


@pytest.mark.parametrize(
    ("factor", "sources"),
    [
        (2, (0, 0, 1, 1, 2, 2)),
        (3, (0, 0, 0, 1, 1, 1, 2, 2, 2)),
        (4, (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)),
    ],
)
def test_interposition_duplicates_each_layer_in_place(
    factor: int, sources: tuple[int, ...]
) -> None:
    assert interposition(3, target=3 * factor).sources == sources


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_stacking_repeats_the_whole_block(factor: int) -> None:
    assert stacking(3, target=3 * factor).sources == (0, 1, 2) * factor


# source layers, target, skip_first, skip_last: interposed, stacked
UNEVEN = [
    (5, 8, 0, 0, (0, 1, 1, 2, 3, 3, 4, 4), (0, 1, 2, 3, 4, 1, 3, 4)),
    (4, 5, 0, 0, (0, 1, 2, 3, 3), (0, 1, 2, 3, 3)),
    (4, 6, 1, 1, (0, 1, 1, 2, 2, 3), (0, 1, 2, 1, 2, 3)),
    (4, 8, 2, 0, (0, 1, 2, 2, 2, 3, 3, 3), (0, 1, 2, 3, 2, 3, 2, 3)),
    (3, 5, 0, 2, (0, 0, 0, 1, 2), (0, 0, 0, 1, 2)),
    (1, 4, 0, 0, (0, 0, 0, 0), (0, 0, 0, 0)),
]


@pytest.mark.parametrize(
    ("num_layers", "target", "skip_first", "skip_last", "interposed", "stacked"), UNEVEN
)
def test_copies_spread_evenly_over_the_layers_between_the_skipped_ends(
    num_layers: int, target: int, skip_first: int, skip_last: int, interposed: tuple, stacked: tuple
) -> None:
    size = {
        "num_layers": num_layers,
        "target": target,
        "skip_first": skip_first,
        "skip_last": skip_last,
    }
    assert _make(interposition, size).sources == interposed
    assert _make(stacking, size).sources == stacked


@settings(deadline=None, max_examples=40)
@given(sizes())
def test_any_target_is_met_and_no_layer_has_two_copies_more_than_another(
    size: dict[str, int],
) -> None:
    for make in (interposition, stacking):
        layers = _make(make, size)
        counts = [layers.sources.count(source) for source in range(size["num_layers"])]
        end = size["num_layers"] - size["skip_last"]
        grown = counts[size["skip_first"] : end]
        assert layers.num_target == size["target"]
        assert counts[: size["skip_first"]] + counts[end:] == [1] * (
            size["skip_first"] + size["skip_last"]
        )
        assert max(grown) - min(grown) <= 1
        assert min(grown) >= 1


@settings(deadline=None, max_examples=40)
@given(sizes())
def test_interposition_keeps_the_order_of_layers_and_stacking_begins_with_the_base(
    size: dict[str, int],
) -> None:
    interposed, stacked = _make(interposition, size), _make(stacking, size)
    assert list(interposed.sources) == sorted(interposed.sources)
    end = size["num_layers"] - size["skip_last"]
    assert stacked.sources[:end] == tuple(range(end))
    assert sorted(stacked.sources) == list(interposed.sources)


@settings(deadline=None, max_examples=40)
@given(sizes())
def test_targets_and_copy_index_invert_the_map(size: dict[str, int]) -> None:
    for make in (interposition, stacking):
        layers = _make(make, size)
        for target, source in enumerate(layers.sources):
            assert layers.targets[source][layers.copy_index[target]] == target
        assert sum(map(len, layers.targets)) == layers.num_target
        assert [layers.copy_index[targets[0]] for targets in layers.targets] == [0] * size[
            "num_layers"
        ]


def test_a_map_may_name_layers_in_any_order_and_number() -> None:
    layers = explicit(3, [2, 0, 0, 1, 2, 2])
    assert layers.sources == (2, 0, 0, 1, 2, 2)
    assert layers.copy_index == (0, 0, 1, 0, 1, 2)
    assert layers.targets == ((1, 2), (3,), (0, 4, 5))


def test_no_depth_growth_is_the_identity_and_growth_is_not() -> None:
    assert identity(3).sources == (0, 1, 2)
    assert identity(3).is_identity
    assert not interposition(3, target=6).is_identity
    assert not explicit(2, [0, 1, 1]).is_identity


def test_a_per_layer_list_follows_the_map() -> None:
    assert explicit(3, [0, 2, 1, 2]).spread(["dense", "moe", "last"]) == [
        "dense",
        "last",
        "moe",
        "last",
    ]


def test_a_per_layer_list_that_misses_a_layer_is_refused() -> None:
    with pytest.raises(PlanError) as refusal:
        identity(3).spread([0, 1])
    assert str(refusal.value) == (
        "a per-layer list has 2 entries but the source has 3 layers; the list must name every layer"
    )


@pytest.mark.parametrize("make", [interposition, stacking])
@pytest.mark.parametrize(
    ("target", "skip_first", "skip_last", "message"),
    [
        (
            8,
            2,
            2,
            "skip_first (2) + skip_last (2) leave no layer of 4 to grow; they must sum to less "
            "than 4",
        ),
        (
            8,
            5,
            0,
            "skip_first (5) + skip_last (0) leave no layer of 4 to grow; they must sum to less "
            "than 4",
        ),
        (
            4,
            0,
            0,
            "target_layers (4) must be above the source's layers (4); growth only adds layers",
        ),
        (
            3,
            1,
            0,
            "target_layers (3) must be above the source's layers (4); growth only adds layers",
        ),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_its_numbers(
    make, target: int, skip_first: int, skip_last: int, message: str
) -> None:
    with pytest.raises(PlanError) as refusal:
        make(4, target=target, skip_first=skip_first, skip_last=skip_last)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            [0, 1, 2, 3],
            "depth.map names layer 3 but the source has layers 0 to 2; use layers of the source "
            "only",
        ),
        (
            [0, 1, 2, -1],
            "depth.map names layer -1 but the source has layers 0 to 2; use layers of the source "
            "only",
        ),
        (
            [0, 0, 2, 2],
            "depth.map leaves out source layer 1: growth loses no layer; "
            "name each of the 3 source layers at least once",
        ),
        (
            [2, 1, 0],
            "depth.map has 3 entries, as many as the source has layers: nothing would grow; "
            "name more layers or leave `depth` out",
        ),
        (
            [],
            "depth.map leaves out source layer 0: growth loses no layer; "
            "name each of the 3 source layers at least once",
        ),
    ],
)
def test_a_map_that_does_not_grow_the_base_is_refused_by_name(
    sources: list[int], message: str
) -> None:
    with pytest.raises(PlanError) as refusal:
        explicit(3, sources)
    assert str(refusal.value) == message
