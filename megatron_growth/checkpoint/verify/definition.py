"""The definition of a grown checkpoint, one source layer and one source expert at a time.

    copy       every target of a source holds its bits
    clone      target experts that are no originals: fp32(source) + fp32(alpha * sigma) * z, from
               the fp32 master where there is one; a weight is the cast of its grown master
    zero       with zero_output, what depth copies add to the residual stream
    moment     with rescale, of whatever has an expert axis, originals and clones alike:
               exp_avg / m, exp_avg_sq / m^2
    parked     with parked clones: their expert_bias is the source's, less the distance from the
               layer's lowest to its highest, less 2; their exp_avg is 0 with rescale, and every
               other moment the source's

sigma is taken over one projection of one source expert, or over a layer's router matrix.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_growth.checkpoint.noise import stream_key
from megatron_growth.checkpoint.verify.values import noisy
from megatron_growth.planning.keys import Key, parse
from megatron_growth.planning.pieces import Shape, Stream
from megatron_growth.planning.plan import GrowthPlan

Place = tuple[int, ...]  # indices on a stored tensor's leading axes

# Name in its layer -> traits. Not the grammar's rules: this is the second opinion on them.
_EXPERT_AXIS = ("mlp.experts.experts.", "mlp.router.")
_EXPERT_NOISE = ("mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight")
_ROUTER_NOISE = "mlp.router.weight"
_SELECTION_BIAS = "mlp.router.expert_bias"
_PARKED_BEHIND = 2.0  # scores are between 0 and 1
_RESIDUAL_OUTPUTS = frozenset(
    f"{module}.{parameter}"
    for parameter in ("weight", "bias")
    for module in (
        "self_attention.linear_proj",
        "mlp.linear_fc2",
        "mlp.shared_experts.linear_fc2",
        "mlp.experts.experts.linear_fc2",
    )
) | {"mlp.fc2_latent_proj.bias"}
_MASTERS = ("param", "fp32_param")
_MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}  # the power of the gradient


@dataclass(frozen=True)
class Part:
    """One layer's, or one layer's and expert's, share of a stored tensor: `place` on its leading
    axes."""

    key: str
    place: Place


@dataclass(frozen=True)
class Target:
    """What becomes of a source part: `layer` and `expert` of the grown model, None without such an
    axis."""

    layer: int | None
    expert: int | None


@dataclass(frozen=True)
class Source:
    """One layer and expert of one of the base's tensors, in all its optimizer states.

    Attributes:
        tensor: the model's tensor; of the decoder without its layer.
        layer: decoder layer of the base, None outside the decoder.
        expert: expert of the base, None without an expert axis.
        states: optimizer states that the base holds of it, None for the model's own tensor.
        is_stacked: whether the base stacks its layers.
    """

    tensor: Key
    layer: int | None
    expert: int | None
    states: tuple[str | None, ...]
    is_stacked: bool

    def part(self, state: str | None) -> Part:
        """Where the base holds it."""
        key = self.tensor.of(state)
        return _part(key, self.layer, self.expert, self.is_stacked)

    def sigma_part(self, state: str | None) -> Part:
        """Where the base holds the values over which sigma is taken."""
        if self.tensor.name == _ROUTER_NOISE:
            return self.layer_part(state)
        return self.part(state)

    def layer_part(self, state: str | None) -> Part:
        """Where the base holds all experts of the layer."""
        return _part(self.tensor.of(state), self.layer, None, self.is_stacked)


class Definition:
    """What a plan makes of a base.

    Args:
        plan: the growth, of which only the stated values are used: maps, scales, seed, rules.
        base: global shape of every tensor of the base that takes part, by key.
    """

    def __init__(self, plan: GrowthPlan, base: Mapping[str, Shape]) -> None:
        self._plan = plan
        self._base = base
        self._keys = {text: parse(text) for text in base}
        self._in_key = plan.target.key_form == "per_layer"

    # -- what there must be

    def shapes(self) -> dict[str, tuple[str, Shape]]:
        """Every target key, with a source key it is made from and its global shape."""
        found: dict[str, tuple[str, Shape]] = {}
        for text, key in self._keys.items():
            shape = self._base[text][1:] if key.is_stacked else self._base[text]
            if _has_experts(key):
                shape = (shape[0] * len(self._experts(0)), *shape[1:])
            layers: list[int | None] = [None]
            if key.place == "decoder":
                sources = range(self._base[text][0]) if key.is_stacked else [key.layer]
                layers = [
                    t for t, source in enumerate(self._plan.layers.sources) if source in sources
                ]
            for layer in layers:
                target = self.part(key, Target(layer, None))
                lead = (len(self._plan.layers.sources),) if target.place else ()
                found[target.key] = text, (*lead, *shape)
        return found

    def sources(self) -> Iterator[Source]:
        """Every source part, each once."""
        states: dict[tuple[Key, int | None, bool], list[str | None]] = defaultdict(list)
        experts: dict[Key, int] = {}
        for text, key in self._keys.items():
            tensor = key.of(None).at(None) if key.place == "decoder" else key.of(None)
            layers: list[int | None] = [None]
            if key.place == "decoder":
                layers = list(range(self._base[text][0])) if key.is_stacked else [key.layer]
            if _has_experts(key):
                experts[tensor] = self._base[text][int(key.is_stacked)]
            for layer in layers:
                states[tensor, layer, key.is_stacked].append(key.state)
        for (tensor, layer, is_stacked), held in states.items():
            for expert in range(experts[tensor]) if tensor in experts else (None,):
                yield Source(tensor, layer, expert, tuple(held), is_stacked)

    def targets(self, source: Source) -> list[Target]:
        """What becomes of a source part."""
        layers: list[int | None] = [None]
        if source.layer is not None:
            layers = [
                t for t, origin in enumerate(self._plan.layers.sources) if origin == source.layer
            ]
        experts: list[int | None] = (
            [None] if source.expert is None else [*self._experts(source.expert)]
        )
        return [Target(layer, expert) for layer in layers for expert in experts]

    def part(self, key: Key, target: Target) -> Part:
        """Where the grown checkpoint holds a target of the tensor `key`, of whatever layer."""
        stacked = key.place == "decoder" and not self._in_key
        return _part(key, target.layer, target.expert, stacked)

    def _experts(self, source: int) -> list[int]:
        experts = self._plan.experts
        return [target for target in range(experts.num_target) if experts.source(target) == source]

    # -- what their values must be

    def is_noisy(self, source: Source, target: Target) -> bool:
        """Whether the target is a clone that draws noise."""
        if target.expert is None or self._plan.experts.clone_index(target.expert) == 0:
            return False
        return self._alpha(source) > 0 and not self._is_zero(source, target)

    def is_parked(self, source: Source, target: Target) -> bool:
        """Whether the target is the selection bias of a clone that takes no token yet."""
        return self._is_waiting(target) and source.tensor.name == _SELECTION_BIAS

    def parked(self, bias: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        """The selection bias of a parked clone.

        Args:
            bias: the source expert's.
            layer: those of all source experts of the layer.
        """
        biases = sorted(layer.flatten().tolist())
        distance = biases[-1] - biases[0]
        values = [value - distance - _PARKED_BEHIND for value in bias.flatten().tolist()]
        return torch.tensor(values, dtype=torch.float64).to(bias.dtype).view(bias.shape)

    def weight(
        self, source: Source, target: Target, exact: torch.Tensor, sigma: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """The target's weight or master.

        Args:
            source: the source part.
            target: which of its targets.
            exact: the source's bits; of a noisy clone, what noise is added to.
            sigma: the standard deviation that scales the noise.
            dtype: of the target.
        """
        if self._is_zero(source, target):
            return torch.zeros(exact.shape, dtype=dtype)
        if not self.is_noisy(source, target):
            return exact
        name, expert = str(source.tensor), target.expert
        assert expert is not None
        stream = Stream(self._plan.seed, name, target.layer, expert)
        return noisy(exact, stream_key(stream), self._alpha(source) * sigma, dtype)

    def moment(
        self, source: Source, target: Target, state: str, value: torch.Tensor
    ) -> torch.Tensor:
        """The moment of one target of a source part."""
        if self._is_still(target, state):
            return torch.zeros_like(value)
        clones = self._clones(source)
        if clones == 1:
            return value
        return (value.float() / float(clones ** _MOMENTS[state])).to(value.dtype)

    def describe(self, source: Source, target: Target, state: str | None) -> str:
        """What a target's value must be, in words."""
        layer = None if source.layer is None else f"layer {source.layer}"
        expert = None if source.expert is None else f"expert {source.expert}"
        whose = " ".join(["the base's", *filter(None, (layer, expert))])
        if is_moment(state):
            assert state is not None
            if self._is_still(target, state):
                return "zero, as the momentum of a parked clone is"
            clones = self._clones(source)
            return f"{whose}" if clones == 1 else f"{whose} / {clones ** _MOMENTS[state]}"
        if self._is_zero(source, target):
            return "zero"
        if self.is_parked(source, target):
            return f"{whose}, below every original of its layer by what parks a clone"
        if self.is_noisy(source, target):
            return f"{whose} with noise of scale {self._alpha(source)} and seed {self._plan.seed}"
        return whose

    def _clones(self, source: Source) -> int:
        """Over how many target experts a source's gradient is split, as far as moments are
        rescaled."""
        if self._plan.optimizer == "copy" or self._plan.parked or source.expert is None:
            return 1
        return len(self._experts(source.expert))

    def _is_waiting(self, target: Target) -> bool:
        """Whether the target belongs to a clone that takes no token yet."""
        if not self._plan.parked or target.expert is None:
            return False
        return self._plan.experts.clone_index(target.expert) != 0

    def _is_still(self, target: Target, state: str) -> bool:
        return self._plan.optimizer == "rescale" and state == "exp_avg" and self._is_waiting(target)

    def _alpha(self, source: Source) -> float:
        if source.tensor.name in _EXPERT_NOISE:
            return self._plan.noise.experts
        return self._plan.noise.router if source.tensor.name == _ROUTER_NOISE else 0.0

    def _is_zero(self, source: Source, target: Target) -> bool:
        if (
            not self._plan.zero_output
            or target.layer is None
            or source.tensor.name not in _RESIDUAL_OUTPUTS
        ):
            return False
        return (
            source.layer in self._plan.layers.sources[: target.layer]
        )  # an earlier target is the original


def is_moment(state: str | None) -> bool:
    return state in _MOMENTS


def is_master(state: str | None) -> bool:
    return state in _MASTERS


def _has_experts(key: Key) -> bool:
    return key.place != "outside" and key.name.startswith(_EXPERT_AXIS)


def _part(key: Key, layer: int | None, expert: int | None, stacked: bool) -> Part:
    if key.place == "decoder":
        key = key.at(None if stacked else layer)
    lead = (layer,) if stacked and layer is not None else ()
    return Part(str(key), lead if expert is None else (*lead, expert))
