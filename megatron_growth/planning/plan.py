"""A growth plan: for any box of any target tensor, which box of which source tensor makes it, and
how.

The plan is a frozen value. It reads nothing and writes nothing; the reader, the writers and the
launcher apply it. Its heart is `GrowthPlan.resolve`. Where does a number in a grown checkpoint come
from? Ask

    plan.resolve("decoder.layers.mlp.experts.experts.linear_fc1.weight", shape, Box((5, 3, 0, 0),
    (1, 1, 64, 64)))

and get pieces, each with a source key, a source box, and a transform (`pieces.py`).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Literal

from megatron_growth.errors import PlanError
from megatron_growth.planning.experts import ExpertMap
from megatron_growth.planning.keys import Key, KeyForm, NoiseKind, ObjectKey, parse
from megatron_growth.planning.layers import LayerMap
from megatron_growth.planning.pieces import (
    Box,
    Copy,
    Divide,
    Noise,
    Park,
    Piece,
    Shape,
    Stream,
    Transform,
    Zero,
)

OptimizerRule = Literal["rescale", "copy", "reset"]

PLAN_VERSION = 1
# exp_avg is linear in the gradient, exp_avg_sq quadratic: the power of m that `rescale` divides
# each by.
MOMENT_POWER = {"exp_avg": 1, "exp_avg_sq": 2}
MASTER_STATES = ("param", "fp32_param")  # distributed optimizer; plain mixed-precision optimizer


@dataclass(frozen=True)
class Architecture:
    """What growth must know of a model.

    Attributes:
        num_layers: decoder layers.
        num_experts: experts of a MoE layer; 0 for a dense model.
        top_k: experts that each token is sent to; None where the checkpoint does not say.
        key_form: whether its checkpoint stacks layers.
    """

    num_layers: int
    num_experts: int
    top_k: int | None
    key_form: KeyForm


@dataclass(frozen=True)
class NoiseScale:
    """Noise scales alpha, in units of the source's standard deviation; 0 copies."""

    experts: float
    router: float

    def of(self, kind: NoiseKind) -> float:
        return self.experts if kind == "experts" else self.router


@dataclass(frozen=True)
class GrowthPlan:
    """Depth and width growth of one source architecture.

    Attributes:
        source: the base model.
        target: the grown model. Its key form may differ from the source's: the view serves either.
        layers: depth, target layer -> source layer.
        experts: width, target expert -> source expert; the identity where only depth grows.
        zero_output: whether depth copies start with zero residual outputs, which keeps the
            function.
        noise: scales of the noise on clones.
        optimizer: what becomes of Adam's moments.
        masters: optimizer state that holds fp32 masters (`param` or `fp32_param`), from which noisy
            clones of the model's weights are then made; None where the base has none or they are
            not trusted (`reset`).
        seed: of the noise.
        arguments: Megatron arguments of the target that are not the base's, beside layers, experts
            and top-k.
        parked: whether clones start with a selection bias that keeps every token from them.
    """

    source: Architecture
    target: Architecture
    layers: LayerMap
    experts: ExpertMap
    zero_output: bool
    noise: NoiseScale
    optimizer: OptimizerRule
    masters: str | None
    seed: int
    arguments: tuple[tuple[str, int | float], ...] = ()
    parked: bool = False

    # -- target names and shapes

    def target_tensors(self, key: Key, shape: Shape) -> Iterator[tuple[Key, Shape]]:
        """The target tensors that source tensor `key` of global shape `shape` becomes."""
        lead, rest = self._split(key, shape, self.source)
        if key.rule.expert_axis:
            rest = (rest[0] * self.experts.factor, *rest[1:])
        if key.place != "decoder":
            yield key, rest
        elif self.target.key_form == "stacked":
            yield key.at(None), (self.target.num_layers, *rest)
        else:
            for layer in lead:
                for target in self.layers.targets[layer]:
                    yield key.at(target), rest

    def target_objects(self, source: ObjectKey) -> Iterator[ObjectKey]:
        """The target objects that the pickled object `source` becomes."""
        key, position, grid = source.key, source.position, source.grid
        if key.place == "outside" or not position:
            yield source
            return
        layers: tuple[int | None, ...] = (None,)
        if key.place == "decoder":
            layer = position[0] if key.is_stacked else key.layer
            assert layer is not None
            layers = self.layers.targets[layer]
            if key.is_stacked:
                position, grid = position[1:], grid[1:]
            elif grid == (1,) and not key.rule.expert_axis:
                position, grid = (
                    (),
                    (),
                )  # per-layer keys say `shard_0_1`; a stack's grid is the layers alone
        experts = [position]
        if key.rule.expert_axis:
            self._check_experts(key, grid[0])
            grid = (grid[0] * self.experts.factor, *grid[1:])
            experts = [(e, *position[1:]) for e in self.experts.targets(position[0])]
        for target, place in product(layers, experts):
            if target is None:
                yield ObjectKey(key, place, grid)
            elif self.target.key_form == "stacked":
                yield ObjectKey(key.at(None), (target, *place), (self.target.num_layers, *grid))
            else:
                yield ObjectKey(key.at(target), place or (0,), grid or (1,))

    # -- where a box comes from

    def resolve(self, key: str, shape: Sequence[int], box: Box) -> tuple[Piece, ...]:
        """Which source boxes and transforms make `box` of the target tensor `key`.

        Args:
            key: checkpoint key of a target tensor.
            shape: its global shape in the grown model.
            box: the part asked for.

        Returns:
            Pieces that tile `box`, one for each (layer, expert) in it.
        """
        parsed = parse(key)
        if parsed.place == "outside":
            return (Piece(box, key, box, Copy()),)
        at = int(parsed.is_stacked)
        layers: Sequence[int | None] = _span(box, 0) if at else (parsed.layer,)
        if not parsed.rule.expert_axis:
            return tuple(
                self._piece(parsed, tuple(shape), box, at, layer, None) for layer in layers
            )
        return tuple(
            self._piece(parsed, tuple(shape), box, at, layer, expert)
            for layer, expert in product(layers, _span(box, at))
        )

    def _piece(
        self, key: Key, shape: Shape, box: Box, at: int, layer: int | None, expert: int | None
    ) -> Piece:
        """The piece of one target layer (None outside the decoder stack's axis) and one target
        expert."""
        coordinates = ([layer] if at else []) + ([] if expert is None else [expert])
        rest = len(coordinates)
        tail = Box(box.offsets[rest:], box.sizes[rest:])
        target = Box((*coordinates, *tail.offsets), (*(1 for _ in coordinates), *tail.sizes))  # type: ignore[arg-type]

        source_layer = layer if key.place == "mtp" else self.layers.sources[layer]  # type: ignore[index]
        stacked = key.place == "decoder" and self.source.key_form == "stacked"
        lead = [source_layer] if stacked else []
        if expert is not None:
            lead.append(self.experts.source(expert))
        source_key = key.at(None if stacked else source_layer)
        source = Box((*lead, *tail.offsets), (*(1 for _ in lead), *tail.sizes))  # type: ignore[arg-type]
        transform = self._transform(key, layer, expert, tuple(lead), shape[rest:])  # type: ignore[arg-type]
        if isinstance(transform, Noise) and key.state is None:
            source_key = source_key.of(self.masters)
        return Piece(target, str(source_key), source, transform)

    def _transform(
        self, key: Key, layer: int | None, expert: int | None, lead: Shape, tail: Shape
    ) -> Transform:
        if key.state in MOMENT_POWER:
            return self._moment(key.state, expert)
        is_copy = key.place == "decoder" and self.layers.copy_index[layer] > 0  # type: ignore[index]
        if self.zero_output and is_copy and key.rule.residual_output:
            return Zero()
        if expert is None or self.experts.clone_index(expert) == 0:
            return Copy()
        all_experts = Box((*lead[:-1], 0, *(0 for _ in tail)),
                          (*(1 for _ in lead[:-1]), self.source.num_experts, *tail))  # fmt: skip
        if self.parked and key.rule.selection_bias:
            return Park(all_experts)
        alpha = self.noise.of(key.rule.noise) if key.rule.noise else 0.0
        if alpha == 0:
            return Copy()
        scope = Box((*lead, *(0 for _ in tail)), (*(1 for _ in lead), *tail))
        if key.rule.noise == "router":
            scope = all_experts
        stream = Stream(self.seed, key.tensor, None if key.place == "mtp" else layer, expert)
        return Noise(alpha, stream, scope, len(lead))

    def _moment(self, state: str, expert: int | None) -> Transform:
        """As the gradient is split: evenly over clones in use, to the original alone while clones
        are parked.

        A parked clone has no gradient yet, so it gets no momentum, which would move it; the second
        moment stays, for zero would make its first updates too large.
        """
        if expert is None or self.experts.is_identity or self.optimizer != "rescale":
            return Copy()
        if not self.parked:
            return Divide(self.experts.factor ** MOMENT_POWER[state])
        is_clone = self.experts.clone_index(expert) > 0
        return Zero() if is_clone and MOMENT_POWER[state] == 1 else Copy()

    # -- checks

    def _split(self, key: Key, shape: Shape, model: Architecture) -> tuple[Sequence[int], Shape]:
        """The layers that a tensor holds, and its shape for one of them."""
        layers: Sequence[int] = () if key.layer is None else (key.layer,)
        rest = shape
        if key.is_stacked:
            layers, rest = range(shape[0]), shape[1:]
            if shape[0] != model.num_layers:
                raise PlanError(
                    f"{key} stacks {shape[0]} layers but the model has {model.num_layers}; "
                    "the checkpoint's tensors and arguments disagree"
                )
        if key.rule.expert_axis:
            self._check_experts(key, rest[0])
        return layers, rest

    def _check_experts(self, key: Key, num_experts: int) -> None:
        if num_experts != self.source.num_experts:
            raise PlanError(
                f"{key} has {num_experts} experts but the model has {self.source.num_experts}; "
                "layers with different numbers of experts cannot be grown"
            )

    # -- JSON

    def to_json(self) -> str:
        """Canonical JSON: the same plan gives the same text."""
        content = {"version": PLAN_VERSION, **asdict(self)}
        for later in ("arguments", "parked"):  # as plans were written before there were any
            if not content[later]:
                del content[later]
        return json.dumps(content, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "GrowthPlan":
        """The plan that `to_json` wrote.

        Raises:
            PlanError: written by another version.
        """
        try:
            fields = dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise PlanError(
                f"this is no plan ({error}); give the JSON that to_json wrote"
            ) from None
        version = fields.pop("version", None)
        if version != PLAN_VERSION:
            raise PlanError(
                f"the plan is of version {version!r} but this megatron_growth reads version "
                f"{PLAN_VERSION}; read it with the version that wrote it"
            )
        layers = fields["layers"]
        return cls(
            **{
                **fields,
                "source": Architecture(**fields["source"]),
                "target": Architecture(**fields["target"]),
                "layers": LayerMap(layers["num_source"], tuple(layers["sources"])),
                "experts": ExpertMap(**fields["experts"]),
                "noise": NoiseScale(**fields["noise"]),
                "arguments": tuple((name, value) for name, value in fields.get("arguments", ())),
            }
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: equal exactly for equal plans."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _span(box: Box, axis: int) -> range:
    return range(box.offsets[axis], box.offsets[axis] + box.sizes[axis])
