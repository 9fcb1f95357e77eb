"""The grammar of Megatron's checkpoint keys, as one table.

A key of a `torch_dist` checkpoint is `[optimizer state] [layer place] name`:

    embedding.word_embeddings.weight                               outside the layers
    decoder.layers.mlp.router.weight                    [L, E, H]  stacked: axis 0 is the layer
    decoder.layers.3.mlp.router.weight                  [E, H]     per-layer: the key has the layer
    mtp.layers.0.transformer_layer.mlp.router.weight    [E, H]     MTP: always per-layer
    optimizer.state.exp_avg.decoder.layers.mlp.router.weight       a moment: the key with a prefix
    decoder.layers.mlp.linear_fc1._extra_state/shard_2_4           an object: its place in a grid

`parse` reads one into a `Key`. What growth does with a tensor follows from its `Rule`: whether it
has an expert axis, which noise its clones draw, whether it writes into the residual stream. A name
that no rule matches is refused: a tensor we do not understand is one we would grow wrongly.

Upstream: `sharded_state_dict` of megatron/core/transformer/transformer_block.py, moe/experts.py and
moe/router.py.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from megatron_growth.errors import CheckpointError

KeyForm = Literal["stacked", "per_layer"]
NoiseKind = Literal["experts", "router"]
Place = Literal["decoder", "mtp", "outside"]


@dataclass(frozen=True)
class Rule:
    """What growth must know of a tensor or object.

    Attributes:
        pattern: matches the name behind the layer place, in full.
        example: a name it matches.
        expert_axis: the first axis behind the layer is the expert; width growth multiplies it.
        noise: the noise that clones along that axis draw; None copies them.
        residual_output: a projection into the residual stream, zero in `zero_output` copies.
        selection_bias: what a router adds to scores when it selects; lowered where clones are
            parked.
        is_object: stored as pickled bytes, one for each grid position.
    """

    pattern: re.Pattern[str]
    example: str
    expert_axis: bool = False
    noise: NoiseKind | None = None
    residual_output: bool = False
    selection_bias: bool = False
    is_object: bool = False


def _rule(pattern: str, example: str, **traits: bool | NoiseKind) -> Rule:
    return Rule(re.compile(pattern), example, **traits)  # type: ignore[arg-type]


_AFFINE = r"(weight|bias)"
# A fused norm lives in the linear that follows it.
_LINEAR = r"(weight|bias|layer_norm_weight|layer_norm_bias)"

LAYER_RULES: tuple[Rule, ...] = (
    _rule(
        r"mlp\.experts\.experts\.linear_fc1\.weight",
        "mlp.experts.experts.linear_fc1.weight",
        expert_axis=True,
        noise="experts",
    ),
    _rule(
        r"mlp\.experts\.experts\.linear_fc2\.weight",
        "mlp.experts.experts.linear_fc2.weight",
        expert_axis=True,
        noise="experts",
        residual_output=True,
    ),
    _rule(
        r"mlp\.experts\.experts\.linear_fc1\.bias",
        "mlp.experts.experts.linear_fc1.bias",
        expert_axis=True,
    ),
    _rule(
        r"mlp\.experts\.experts\.linear_fc2\.bias",
        "mlp.experts.experts.linear_fc2.bias",
        expert_axis=True,
        residual_output=True,
    ),
    _rule(
        r"mlp\.experts\.experts\.linear_fc[12]\._extra_state",
        "mlp.experts.experts.linear_fc1._extra_state",
        expert_axis=True,
        is_object=True,
    ),
    _rule(r"mlp\.router\.weight", "mlp.router.weight", expert_axis=True, noise="router"),
    _rule(
        r"mlp\.router\.expert_bias",
        "mlp.router.expert_bias",
        expert_axis=True,
        selection_bias=True,
    ),
    _rule(r"mlp\.router\.(bias|qb_beta)", "mlp.router.bias", expert_axis=True),
    _rule(r"mlp\.shared_experts\.linear_fc1\." + _LINEAR, "mlp.shared_experts.linear_fc1.weight"),
    _rule(
        r"mlp\.shared_experts\.linear_fc2\." + _AFFINE,
        "mlp.shared_experts.linear_fc2.weight",
        residual_output=True,
    ),
    _rule(r"mlp\.shared_experts\.gate_weight", "mlp.shared_experts.gate_weight"),
    # Its bias reaches the residual stream even when the experts behind it are zero; its weight then
    # need not be, and must not be: with both zero neither would get a gradient.
    _rule(r"mlp\.fc2_latent_proj\.bias", "mlp.fc2_latent_proj.bias", residual_output=True),
    _rule(
        r"mlp\.fc2_latent_proj\.(weight|layer_norm_weight|layer_norm_bias)",
        "mlp.fc2_latent_proj.weight",
    ),
    _rule(r"mlp\.fc1_latent_proj\." + _LINEAR, "mlp.fc1_latent_proj.weight"),
    _rule(r"mlp\.linear_fc1\." + _LINEAR, "mlp.linear_fc1.layer_norm_weight"),
    _rule(r"mlp\.linear_fc2\." + _AFFINE, "mlp.linear_fc2.weight", residual_output=True),
    _rule(r"self_attention\.linear_qkv\." + _LINEAR, "self_attention.linear_qkv.weight"),
    _rule(
        r"self_attention\.linear_(q|kv|qkv)(_down|_up)?_proj\." + _LINEAR,
        "self_attention.linear_kv_up_proj.weight",
    ),
    _rule(
        r"self_attention\.linear_proj\." + _AFFINE,
        "self_attention.linear_proj.weight",
        residual_output=True,
    ),
    _rule(r"self_attention\.(q|k|kv)_layernorm\." + _AFFINE, "self_attention.q_layernorm.weight"),
    _rule(
        r"self_attention\.core_attention\.softmax_offset",
        "self_attention.core_attention.softmax_offset",
    ),
    _rule(r"(input|pre_mlp)_layernorm\." + _AFFINE, "pre_mlp_layernorm.weight"),
    _rule(
        r"(self_attention|mlp|input_layernorm|pre_mlp_layernorm)(\.\w+)*\._extra_state",
        "self_attention.linear_qkv._extra_state",
        is_object=True,
    ),
)

# Around the layer that a multi-token-prediction module wraps.
MTP_RULES: tuple[Rule, ...] = (
    _rule(r"(eh_proj|enorm|hnorm|final_layernorm)\." + _AFFINE, "eh_proj.weight"),
    _rule(
        r"(eh_proj|enorm|hnorm|final_layernorm)\._extra_state",
        "eh_proj._extra_state",
        is_object=True,
    ),
)

OUTSIDE_RULES: tuple[Rule, ...] = (
    _rule(r"embedding\.(word|position)_embeddings\.weight", "embedding.word_embeddings.weight"),
    _rule(r"(decoder\.)?final_layernorm\." + _AFFINE, "decoder.final_layernorm.weight"),
    _rule(r"output_layer\." + _AFFINE, "output_layer.weight"),
    _rule(
        r"(decoder\.final_layernorm|output_layer)\._extra_state",
        "output_layer._extra_state",
        is_object=True,
    ),
    # The state of a run, not of a model: passed on as it is.
    _rule(r"rng_state", "rng_state", is_object=True),
    _rule(r"rerun_state_machine_state", "rerun_state_machine_state", is_object=True),
    _rule(r"common_state", "common_state", is_object=True),
)

# Any optimizer's state in any format, chained or not:
# chained_0.optimizer.distributed.dp_group_idx_0...
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
# optimizer.state.exp_avg.<model key>
_OPTIMIZER_STATE = re.compile(
    r"optimizer\.state\.(?P<state>param|fp32_param|exp_avg|exp_avg_sq)\.(?P<rest>.+)"
)
# decoder.layers.3.mlp.router.weight, or without the 3 when layers are stacked
_DECODER_LAYER = re.compile(r"decoder\.layers\.((?P<layer>\d+)\.)?(?P<name>.+)")
# mtp.layers.0.transformer_layer.mlp.router.weight, mtp.layers.0.eh_proj.weight
_MTP_LAYER = re.compile(
    r"mtp\.layers\.(?P<layer>\d+)\.(?P<wrapped>(transformer_layer|mtp_model_layer)\.)?(?P<name>.+)"
)
# decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_2.1_4.4
_OBJECT = re.compile(r"(?P<base>.+)/shard_(?P<position>\d+(\.\d+)*)_(?P<grid>\d+(\.\d+)*)")

# Why a key that no rule matches cannot be grown, where we know.
_REFUSED: tuple[tuple[re.Pattern[str], str], ...] = (
    # optimizer.distributed.dp_group_idx_0.param_state
    (re.compile(r"(chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.param_state"),
     "optimizer state of format dp_zero_gather_scatter is one object for all parameters of a rank; "
     "train the base with --dist-ckpt-optim-fully-reshardable, or grow weights only with "
     "`optimizer: reset`"),
    # optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(...).bucket_idx_0.param
    (re.compile(r"(chained_\d+\.)?optimizer\.distributed\."),
     "optimizer state of format dp_reshardable is keyed by flat buffers, not by tensors; change "
     "it with `torchrun ... -m megatron_growth.reshard`, train the base with "
     "--dist-ckpt-optim-fully-reshardable, or grow weights only with `optimizer: reset`"),
    # optimizer.state.master_param.decoder.layers.mlp.router.weight
    (re.compile(r"optimizer\.state\.(?!(param|fp32_param|exp_avg|exp_avg_sq)\.)"),
     "this optimizer's state has no growth rule; grow weights only with `optimizer: reset`"),
    # decoder.layers.3.mlp.experts.experts.0.linear_fc1.weight_w
    (re.compile(r"(optimizer\.state\.\w+\.)?decoder\.layers\.(\d+\.)?mlp\.experts\.experts\.\d+\."),
     "experts saved one key each (singleton_local_shards) cannot be grown; save the base with "
     "megatron-core 0.17 to 0.19, which stacks them"),
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A checkpoint key, read.

    Attributes:
        name: what the tensor is within its layer, `mlp.router.weight`; the same for both key forms.
        rule: how growth treats it.
        place: the decoder's layers, an MTP module, or outside both.
        layer: the layer when the key names it, else None.
        wrapper: text between the MTP layer number and `name` (`transformer_layer.`), else empty.
        state: optimizer state (`param`, `exp_avg`, ...) or None for the model's own tensor.
    """

    name: str
    rule: Rule
    place: Place
    layer: int | None = None
    wrapper: str = ""
    state: str | None = None

    @property
    def is_stacked(self) -> bool:
        """Axis 0 is the decoder layer."""
        return self.place == "decoder" and self.layer is None

    def at(self, layer: int | None) -> "Key":
        """The same tensor of another layer; None is the stack of all."""
        return replace(self, layer=layer)

    def of(self, state: str | None) -> "Key":
        """The same tensor's optimizer state, or with None the model's tensor itself."""
        return replace(self, state=state)

    def __str__(self) -> str:
        prefix = f"optimizer.state.{self.state}." if self.state else ""
        if self.place == "outside":
            return prefix + self.name
        layer = "" if self.layer is None else f"{self.layer}."
        return f"{prefix}{self.place}.layers.{layer}{self.wrapper}{self.name}"

    @property
    def tensor(self) -> str:
        """The tensor's name in noise streams: no optimizer state and no decoder layer in it.

        A weight and its fp32 master draw the same noise, and so do both key forms.
        """
        if self.place == "mtp":
            return str(self.of(None))
        return str(self.of(None).at(None))


@dataclass(frozen=True)
class ObjectKey:
    """The key of one pickled object: which, and its place in a grid (layers, experts, or ranks)."""

    key: Key
    position: tuple[int, ...]
    grid: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key}/shard_{_dotted(self.position)}_{_dotted(self.grid)}"


def is_optimizer_key(text: str) -> bool:
    """Whether a key is optimizer state, of whatever format: what a weights-only growth leaves
    behind."""
    return _OPTIMIZER.match(text) is not None


def parse(text: str) -> Key:
    """Read the key of a tensor, or the part of an object's key before `/shard_`.

    Raises:
        CheckpointError: no rule matches; the message says why where that is known.
    """
    state, rest = None, text
    if match := _OPTIMIZER_STATE.fullmatch(text):
        state, rest = match["state"], match["rest"]
    if match := _DECODER_LAYER.fullmatch(rest):
        rule = _find(LAYER_RULES, match["name"])
        if rule:
            return Key(match["name"], rule, "decoder", _number(match["layer"]), state=state)
    if match := _MTP_LAYER.fullmatch(rest):
        wrapped = match["wrapped"] or ""
        rule = _find(LAYER_RULES if wrapped else MTP_RULES, match["name"])
        if rule:
            return Key(match["name"], rule, "mtp", int(match["layer"]), wrapped, state)
    if rule := _find(OUTSIDE_RULES, rest):
        return Key(rest, rule, "outside", state=state)
    raise CheckpointError(f"checkpoint key {text!r} cannot be grown: {_why(text)}")


def parse_object(text: str) -> ObjectKey:
    """Read the key of a pickled object, `<key>/shard_<position>_<grid>`; a plain key is one
    alone."""
    match = _OBJECT.fullmatch(text)
    if not match:
        key = parse(text)
        if key.place != "outside":
            raise CheckpointError(
                f"checkpoint object {text!r} does not say which layer it is of (`/shard_...`), so "
                "it cannot be grown; save the base with megatron-core 0.17 to 0.19"
            )
        return ObjectKey(key, (), ())
    return ObjectKey(parse(match["base"]), _numbers(match["position"]), _numbers(match["grid"]))


def _find(rules: tuple[Rule, ...], name: str) -> Rule | None:
    return next((rule for rule in rules if rule.pattern.fullmatch(name)), None)


def _why(text: str) -> str:
    for pattern, reason in _REFUSED:
        if pattern.match(text):
            return reason
    return (
        "the key grammar (megatron_growth/planning/keys.py) does not know it, so how it should "
        "grow is not known; add a rule there or save the base without it"
    )


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
