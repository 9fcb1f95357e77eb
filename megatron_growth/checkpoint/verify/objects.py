"""Every pickled object.

Extra states (fp8 scales, say) sit one at each grid position,
`<key>/shard_<layer>.<expert>_<L>.<E>`; a grown one is its source's. The state of a run (random
numbers, the rerun machine) has a grid of ranks, and a run has its own: that it is whole is checked,
what is in it is not.
"""

import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import batched
from typing import Any

import torch

from megatron_growth.checkpoint.verify.problem import Problem
from megatron_growth.checkpoint.verify.stored import Stored
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.plan import GrowthPlan

# decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_2.1_4.4
_OBJECT = re.compile(r"(?P<base>.+)/shard_(?P<position>\d+(\.\d+)*)_(?P<grid>\d+(\.\d+)*)")
# decoder.layers.3.self_attention.linear_qkv._extra_state, or without the 3
_DECODER = re.compile(r"decoder\.layers\.((?P<layer>\d+)\.)?(?P<name>.+)")
_RUN_STATE = ("rng_state", "rerun_state_machine_state", "common_state")
_BATCH = 256  # source objects in memory at a time, with all that became of them


def check_objects(
    plan: GrowthPlan, base: Stored, grown: Stored, report: Callable[[Problem], None]
) -> int:
    """Compare every object but the state of a run; how many were compared."""
    sources = [key for key in base.objects if not _is_run_state(key)]
    expected = {target: source for source in sources for target in _targets(plan, source)}
    found = {key for key in grown.objects if not _is_run_state(key)}
    for key in sorted(expected.keys() - found):
        report(Problem(key, "is missing"))
    for key in sorted(found - expected.keys()):
        report(Problem(key, "is no object of the grown model"))
    _check_run_state(base, grown, report)
    copies: dict[str, list[str]] = defaultdict(list)
    for target in sorted(expected.keys() & found):
        copies[expected[target]].append(target)
    for batch in batched(copies, _BATCH):
        _compare(base, grown, {source: copies[source] for source in batch}, report)
    return sum(map(len, copies.values()))


def _compare(
    base: Stored, grown: Stored, copies: Mapping[str, list[str]], report: Callable[[Problem], None]
) -> None:
    sources = base.read_objects(copies)
    try:
        targets = grown.read_objects(target for made in copies.values() for target in made)
    except CheckpointError as error:
        report(Problem("", str(error)))
        return
    for source, made in copies.items():
        for target in made:
            if not _same(sources[source], targets[target]):
                report(Problem(target, f"is not the base's {source}"))


def _same(one: bytes, other: bytes) -> bool:
    """Equal bytes, or equal content: what was loaded and saved again need not pickle alike."""
    return one == other or _equal(_unpickled(one), _unpickled(other))


def _unpickled(content: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    except Exception:  # damaged bytes can raise anything; they then equal only themselves
        return content


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, io.BytesIO) and isinstance(other, io.BytesIO):
        return _same(one.getvalue(), other.getvalue())
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)


# -- which objects there must be


def _targets(plan: GrowthPlan, text: str) -> Iterator[str]:
    """The grown objects that one of the base becomes."""
    match = _OBJECT.fullmatch(text)
    decoder = _DECODER.fullmatch(match["base"]) if match else None
    of_experts = match is not None and "mlp.experts.experts." in match["base"]
    if match is None or not (decoder or of_experts):
        yield text
        return
    position, grid = _numbers(match["position"]), _numbers(match["grid"])
    layers: list[int] = []
    if decoder:
        in_grid = decoder["layer"] is None
        source = position[0] if in_grid else int(decoder["layer"])
        layers = [target for target, origin in enumerate(plan.layers.sources) if origin == source]
        if in_grid:
            position, grid = position[1:], grid[1:]
        elif not of_experts:
            position, grid = (), ()  # a layer's one object is `shard_0_1`: nothing of a grid
    inner = [(position, grid)]
    if of_experts:
        experts = plan.experts
        clones = [
            target for target in range(experts.num_target) if experts.source(target) == position[0]
        ]
        inner = [((clone, *position[1:]), (experts.num_target, *grid[1:])) for clone in clones]
    num_layers = len(plan.layers.sources)
    for place, whole in inner:
        if not decoder:
            yield _shard(match["base"], place, whole)
        elif plan.target.key_form == "stacked":
            key = f"decoder.layers.{decoder['name']}"
            yield from (_shard(key, (layer, *place), (num_layers, *whole)) for layer in layers)
        else:
            keys = (f"decoder.layers.{layer}.{decoder['name']}" for layer in layers)
            yield from (_shard(key, place or (0,), whole or (1,)) for key in keys)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _shard(key: str, position: tuple[int, ...], grid: tuple[int, ...]) -> str:
    return f"{key}/shard_{'.'.join(map(str, position))}_{'.'.join(map(str, grid))}"


def _is_run_state(text: str) -> bool:
    return text.partition("/")[0] in _RUN_STATE


def _check_run_state(base: Stored, grown: Stored, report: Callable[[Problem], None]) -> None:
    """Each name of the base is there, with every position of one grid."""
    for name in sorted({text.partition("/")[0] for text in base.objects if _is_run_state(text)}):
        matches = [match for key in grown.objects if (match := _OBJECT.fullmatch(key))]
        shards = [match for match in matches if match["base"] == name]
        grids = {match["grid"] for match in shards}
        if len(grids) != 1:
            report(
                Problem(name, "is missing" if not grids else f"has shards of {len(grids)} grids")
            )
        elif name != "common_state" and len(shards) != (whole := _grid_size(grids.pop())):
            report(Problem(name, f"has {len(shards)} of its {whole} shards"))


def _grid_size(grid: str) -> int:
    return math.prod(_numbers(grid))
