"""Every pickled object, and the common state's description of the grown model.

Extra states (fp8 scales, say) sit one at each grid position, `<key>/shard_<layer>.<expert>_<L>.<E>`; a grown one is
its source's. The state of a run (random numbers, the rerun machine) has a grid of ranks, and a run has its own: that
it is whole is checked, what is in it is not.
"""

import io
import math
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import batched
from typing import Any

import torch

from megatron_growth.checkpoint.source import COMMON_OBJECT
from megatron_growth.checkpoint.verify.problem import Problem
from megatron_growth.checkpoint.verify.stored import Stored
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.patterns import PATTERN_ARGUMENTS, written_out
from megatron_growth.planning.plan import GrowthPlan

# decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_2.1_4.4
_OBJECT = re.compile(r"(?P<base>.+)/shard_(?P<position>\d+(\.\d+)*)_(?P<grid>\d+(\.\d+)*)")
# decoder.layers.3.self_attention.linear_qkv._extra_state, or without the 3
_DECODER = re.compile(r"decoder\.layers\.((?P<layer>\d+)\.)?(?P<name>.+)")
_RUN_STATE = ("rng_state", "rerun_state_machine_state", "common_state")
_BATCH = 256  # source objects in memory at a time, with all that became of them

# What growth leaves as it is, of the arguments that shape a model. A run's other arguments are its own.
_SHAPE_ARGUMENTS = (
    "hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_latent_size",
    "num_attention_heads", "num_query_groups", "kv_channels", "mtp_num_layers", "padded_vocab_size",
    "moe_router_pre_softmax", "moe_router_score_function",
)  # fmt: skip


def check_objects(plan: GrowthPlan, base: Stored, grown: Stored, report: Callable[[Problem], None]) -> int:
    """Compare every object but the state of a run; how many were compared."""
    expected = {target: text for text in base.objects if not _is_run_state(text) for target in _targets(plan, text)}
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


# -- which objects there must be -----------------------------------------------------------------------------


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
        clones = [target for target in range(experts.num_target) if experts.source(target) == position[0]]
        inner = [((clone, *position[1:]), (experts.num_target, *grid[1:])) for clone in clones]
    for place, whole in inner:
        if not decoder:
            yield _shard(match["base"], place, whole)
        for layer in layers:
            if plan.target.key_form == "stacked":
                yield _shard(f"decoder.layers.{decoder['name']}", (layer, *place), (len(plan.layers.sources), *whole))  # type: ignore[index]
            else:
                yield _shard(f"decoder.layers.{layer}.{decoder['name']}", place or (0,), whole or (1,))  # type: ignore[index]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _shard(key: str, position: tuple[int, ...], grid: tuple[int, ...]) -> str:
    return f"{key}/shard_{'.'.join(map(str, position))}_{'.'.join(map(str, grid))}"


def _is_run_state(text: str) -> bool:
    return text.partition("/")[0] in _RUN_STATE


def _check_run_state(base: Stored, grown: Stored, report: Callable[[Problem], None]) -> None:
    """Each name of the base is there, with every position of one grid."""
    for name in sorted({text.partition("/")[0] for text in base.objects if _is_run_state(text)}):
        shards = [match for key in grown.objects if (match := _OBJECT.fullmatch(key)) and match["base"] == name]
        grids = {match["grid"] for match in shards}
        if len(grids) != 1:
            report(Problem(name, "is missing" if not grids else f"has shards of {len(grids)} grids"))
        elif name != "common_state" and len(shards) != (whole := _grid_size(grids.pop())):
            report(Problem(name, f"has {len(shards)} of its {whole} shards"))


def _grid_size(grid: str) -> int:
    return math.prod(_numbers(grid))


# -- the common state ----------------------------------------------------------------------------------------


def check_common_state(
    plan: GrowthPlan,
    base: Mapping[str, Any] | None,
    grown: Mapping[str, Any] | None,
    report: Callable[[Problem], None],
) -> None:
    """The grown model's arguments describe it, and Adam is at the base's step."""
    if base is None:
        return
    if grown is None:
        report(Problem(COMMON_OBJECT, "is missing: the grown checkpoint has no common state"))
        return
    before, after = base.get("args"), grown.get("args")
    if before is not None and after is None:
        report(Problem(COMMON_OBJECT, "has no args"))
    elif before is not None:
        for what in _wrong_arguments(plan, before, after):
            report(Problem(COMMON_OBJECT, what))
    for what in _wrong_optimizer(plan, base.get("optimizer"), grown.get("optimizer")):
        report(Problem(COMMON_OBJECT, what))


def _wrong_arguments(plan: GrowthPlan, base: Namespace, grown: Namespace) -> Iterator[str]:
    wanted: dict[str, Any] = {name: getattr(base, name, None) for name in _SHAPE_ARGUMENTS}
    num_layers = len(plan.layers.sources)
    wanted["num_layers"] = num_layers
    if getattr(base, "encoder_num_layers", None) is not None:
        wanted["encoder_num_layers"] = num_layers
    wanted["num_experts"] = plan.experts.num_target or None
    wanted["moe_router_topk"] = plan.target.top_k if plan.experts.num_target else getattr(base, "moe_router_topk", None)
    for name, value in wanted.items():
        if (found := getattr(grown, name, None)) != value:
            yield f"args.{name} is {found!r}, not {value!r}"
    for name in PATTERN_ARGUMENTS:
        entries = written_out(name, getattr(base, name, None), plan.layers.num_source)
        pattern = entries and [entries[source] for source in plan.layers.sources]
        if (found := written_out(name, getattr(grown, name, None), num_layers)) != pattern:
            yield f"args.{name} says {found!r} of the layers, not {pattern!r}"
    layout = getattr(base, "pipeline_model_parallel_layout", None)
    if layout is not None and num_layers > plan.layers.num_source:
        if getattr(grown, "pipeline_model_parallel_layout", None) == layout:
            yield f"args.pipeline_model_parallel_layout names the base's {plan.layers.num_source} layers"


def _wrong_optimizer(plan: GrowthPlan, base: Any, grown: Any) -> Iterator[str]:
    if plan.optimizer == "reset":
        if grown is not None:
            yield "has optimizer state, which the plan resets"
    elif base is not None and grown is None:
        yield "has no optimizer state, which the plan keeps"
    elif base is not None and (before := set(_steps(base))) != (after := set(_steps(grown))):
        yield f"has Adam at step {sorted(after)}, not {sorted(before)}"


def _steps(state: Any) -> Iterable[int]:
    """Every step in an optimizer's common state, `step` of its groups or `common_step`."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            if key in ("step", "common_step") and value is not None:
                yield int(value)
            else:
                yield from _steps(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _steps(value)
