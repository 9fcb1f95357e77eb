"""Depth growth: which source layer each target layer is a copy of.

A `LayerMap` is the whole of depth growth: a tuple that names, for each target layer, its source
layer. Everything that goes by layer position (weights, moments, `moe_layer_freq`, window and rope
patterns) follows this one map.

Three ways to make one (arXiv:2510.08008, section 3.1):

    interposition   0 1 2 3  x2  ->  0 0 1 1 2 2 3 3      each layer in place; the paper's method
    stacking        0 1 2 3  x2  ->  0 1 2 3 0 1 2 3      the whole block again; the baseline
    map     any list of source layers

`skip_first` and `skip_last` layers stay single. A target count that is no multiple spreads the
copies evenly.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from megatron_growth.errors import PlanError

T = TypeVar("T")


@dataclass(frozen=True)
class LayerMap:
    """Target layer -> source layer.

    Attributes:
        num_source: layers of the source.
        sources: for each target layer, its source layer; every source layer appears.
    """

    num_source: int
    sources: tuple[int, ...]

    @property
    def num_target(self) -> int:
        return len(self.sources)

    @property
    def is_identity(self) -> bool:
        return self.sources == tuple(range(self.num_source))

    @cached_property
    def copy_index(self) -> tuple[int, ...]:
        """For each target layer, how many earlier target layers share its source: 0 is the
        original."""
        seen: Counter[int] = Counter()
        indices = []
        for source in self.sources:
            indices.append(seen[source])
            seen[source] += 1
        return tuple(indices)

    @cached_property
    def targets(self) -> tuple[tuple[int, ...], ...]:
        """For each source layer, the target layers made from it, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_source)]
        for target, source in enumerate(self.sources):
            found[source].append(target)
        return tuple(tuple(targets) for targets in found)

    def spread(self, values: Sequence[T]) -> list[T]:
        """Grow a list that has one entry for each source layer, `moe_layer_freq` say."""
        if len(values) != self.num_source:
            raise PlanError(
                f"a per-layer list has {len(values)} entries but the source has {self.num_source} "
                "layers; the list must name every layer"
            )
        return [values[source] for source in self.sources]


def identity(num_layers: int) -> LayerMap:
    """No depth growth."""
    return LayerMap(num_layers, tuple(range(num_layers)))


def interposition(
    num_layers: int, *, target: int, skip_first: int = 0, skip_last: int = 0
) -> LayerMap:
    """Duplicate each layer in place until there are `target` layers in all."""
    counts = _copies(num_layers, target, skip_first, skip_last)
    return LayerMap(
        num_layers, tuple(layer for layer, count in enumerate(counts) for _ in range(count))
    )


def stacking(num_layers: int, *, target: int, skip_first: int = 0, skip_last: int = 0) -> LayerMap:
    """Repeat the block of layers between the skipped ends until there are `target` layers in
    all."""
    counts = _copies(num_layers, target, skip_first, skip_last)
    last = num_layers - skip_last
    middle = range(skip_first, last)
    rounds = (
        [layer for layer in middle if counts[layer] > turn]
        for turn in range(max(counts, default=0))
    )
    stacked = [layer for block in rounds for layer in block]
    return LayerMap(num_layers, (*range(skip_first), *stacked, *range(last, num_layers)))


def explicit(num_layers: int, sources: Sequence[int]) -> LayerMap:
    """Take the user's own list: entry `t` is the source layer of target layer `t`."""
    wrong = [layer for layer in sources if not 0 <= layer < num_layers]
    if wrong:
        raise PlanError(
            f"depth.map names layer {wrong[0]} but the source has layers 0 to {num_layers - 1}; "
            "use layers of the source only"
        )
    lost = sorted(set(range(num_layers)) - set(sources))
    if lost:
        raise PlanError(
            f"depth.map leaves out source layer {lost[0]}: growth loses no layer; name each of the "
            f"{num_layers} source layers at least once"
        )
    if len(sources) == num_layers:
        raise PlanError(
            f"depth.map has {len(sources)} entries, as many as the source has layers: nothing "
            "would grow; name more layers or leave `depth` out"
        )
    return LayerMap(num_layers, tuple(sources))


def _copies(num_layers: int, target: int, skip_first: int, skip_last: int) -> list[int]:
    """How many target layers each source layer becomes, spread evenly over those not skipped."""
    grown = num_layers - skip_first - skip_last
    if grown < 1:
        raise PlanError(
            f"skip_first ({skip_first}) + skip_last ({skip_last}) leave no layer of {num_layers} "
            f"to grow; they must sum to less than {num_layers}"
        )
    if target <= num_layers:
        raise PlanError(
            f"target_layers ({target}) must be above the source's layers ({num_layers}); "
            "growth only adds layers"
        )
    total = target - skip_first - skip_last
    middle = [(i + 1) * total // grown - i * total // grown for i in range(grown)]
    return [1] * skip_first + middle + [1] * skip_last
