"""The shape of a model: what decides how many tensors it has, and how large they are.

Fields bear Megatron's names, so that `num_layers: 28` is `--num-layers 28`. What changes no
tensor's shape (rope, router losses, norms' epsilon) goes into `megatron`, by the name of Megatron's
option; an option that would change them, and that no field says, is refused there.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from megatron_growth.config import MOST, Many
from megatron_growth.sections import Positive, Strict, Written

Value = bool | int | float | str | list[int] | list[float] | list[str]
Option = Annotated[
    str, Written(r"(--)?[A-Za-z0-9][-\w.]*", "the name of an option, as in rotary-base")
]


def _named(options: dict[str, Value | None]) -> dict[str, Value | None]:
    """Names with dashes, as Megatron writes them, each once."""
    table: dict[str, Value | None] = {}
    said: dict[str, str] = {}
    for option, value in options.items():
        name = option.removeprefix("--").replace("_", "-")
        if name in said:
            raise ValueError(
                f"{said[name]!r} and {option!r} are one option of Megatron; keep one (what lies "
                "over a file or defaults must spell it as they do)"
            )
        said[name], table[name] = option, value
    return table


Options = Annotated[dict[Option, Value | None], AfterValidator(_named)]

# [0]*3+[1]*58, as on Megatron's command line
_RUN = re.compile(r"\[\s*([01])\s*\]\s*\*\s*(\d+)")

# Options that give a model tensors which `planning/inventory.py` does not count, and what they do.
_NOT_COUNTED = {
    "hybrid-layer-pattern": "layers that are no transformer's",
    "hybrid-override-pattern": "layers that are no transformer's",
    "is-hybrid-model": "layers that are no transformer's",
    "spec": "layers of a specification of its own",
    "heterogeneous-layers-config-path": "layers that differ from each other",
    "heterogeneous-layers-config-encoded-json": "layers that differ from each other",
    "experimental-attention-variant": "an attention with tensors of its own",
    "attention-output-gate": "a gate in its attention",
    "mtp-use-repeated-layer": "one layer that all its multi-token-prediction modules share",
    "mtp-hybrid-override-pattern": "modules that are no transformer's",
    "quick-geglu": "gates that are no SwiGLU",
}
# The values of options that add no tensor.
_NONE_ADDED = {
    "position-embedding-type": ("rope", "yarn", "mrope", "none"),
    "softmax-type": ("vanilla", "off-by-one"),
}


def _written_out(value: object) -> object:
    if not isinstance(value, str):
        return value
    runs = [_RUN.fullmatch(part.strip()) for part in value.split("+")]
    if not all(runs):
        raise ValueError(f"{value!r} is no pattern of layers; write it as in '[0]*3+[1]*58'")
    length = sum(int(run[2]) for run in runs if run)
    if length > MOST:
        raise ValueError(f"{value!r} says {length} layers; {MOST} at most")
    return [int(run[1]) for run in runs if run for _ in range(int(run[2]))]


class Geometry(Strict):
    """A GPT model with Mixture-of-Experts layers."""

    num_layers: Many
    """Transformer layers."""

    hidden_size: Positive
    """Width of the residual stream."""

    num_attention_heads: Positive
    """Attention heads."""

    num_query_groups: Positive | None = None
    """Key-value heads of grouped-query attention; as many as heads by default."""

    kv_channels: Positive | None = None
    """Size of a head; hidden_size / num_attention_heads by default."""

    ffn_hidden_size: Positive | None = None
    """Width of the dense layers' MLP; Megatron's default of 4 hidden_size is for those without,
    so a model with dense layers must say it."""

    num_experts: Many
    """Routed experts of a layer."""

    moe_router_topk: Positive
    """Experts that a token uses."""

    moe_ffn_hidden_size: Positive
    """Width of an expert."""

    swiglu: bool = True
    """MLPs and experts have a gate; false for those without, whose activation is an option:
    `squared-relu: true`."""

    moe_layer_freq: Annotated[
        Positive | list[Annotated[int, Field(ge=0, le=1)]],
        BeforeValidator(_written_out),
    ] = 1
    """Which layers are MoE: every n-th, or a 1 or 0 for each, also as '[0]*3+[1]*58'."""

    moe_shared_expert_intermediate_size: Positive | None = None
    """Width of all shared experts together; none by default."""

    moe_shared_expert_gate: bool = False
    """A gate on what the shared experts give."""

    moe_latent_size: Positive | None = None
    """Width to which experts' inputs are projected first; none by default."""

    multi_latent_attention: bool = False
    """DeepSeek's attention; the sizes below are its own."""

    q_lora_rank: Positive | None = None
    """Rank of the query's down-projection; none by default."""

    kv_lora_rank: Positive = 512
    """Rank of the key-value down-projection."""

    qk_head_dim: Positive = 128
    """Size of a query-key head, without its rotary part."""

    qk_pos_emb_head_dim: Positive = 64
    """Size of the rotary part."""

    v_head_dim: Positive = 128
    """Size of a value head."""

    qk_layernorm: bool = False
    """A norm on queries and keys."""

    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """The norms; LayerNorm's have biases."""

    add_bias_linear: bool = False
    """Linear layers and the router have biases."""

    add_qkv_bias: bool = False
    """Of the attention, queries, keys and values have biases."""

    mtp_num_layers: Positive | None = None
    """Multi-token-prediction modules; none by default."""

    vocab_size: Positive
    """Tokens, padding not counted."""

    untie_embeddings_and_output_weights: bool = True
    """Input and output embeddings are two tensors."""

    megatron: Options = {}
    """Whatever else makes the model, by the names of Megatron's options without `--`:
    `rotary-base: 10000`; true for a switch, null to take one of an extended file back."""

    @field_validator("megatron")
    @classmethod
    def _counted(cls, options: Options) -> Options:
        for name, value in options.items():
            fine = (None, False, *_NONE_ADDED.get(name, ()))
            if value in fine or name not in (*_NOT_COUNTED, *_NONE_ADDED):
                continue
            gives = _NOT_COUNTED.get(name, "a tensor for it in every such model")
            raise ValueError(
                f"{name} {value!r} gives the model {gives}, which an experiment cannot count or "
                "divide; leave it out, or grow such a checkpoint with a growth file, which counts "
                "what is there"
            )
        return options

    @model_validator(mode="after")
    def _consistent(self) -> "Geometry":
        if self.moe_router_topk > self.num_experts:
            raise ValueError(
                f"moe_router_topk ({self.moe_router_topk}) must not be above num_experts "
                f"({self.num_experts}); lower it"
            )
        pattern = self.moe_layer_freq
        if isinstance(pattern, list) and len(pattern) != self.num_layers:
            raise ValueError(
                f"moe_layer_freq has {len(pattern)} entries for num_layers ({self.num_layers}); "
                "give one for each layer"
            )
        if not all(self.moe_layers) and self.ffn_hidden_size is None:
            raise ValueError(
                f"{self.moe_layers.count(False)} of {self.num_layers} layers are dense, and their "
                "width is not given; set ffn_hidden_size"
            )
        shared = self.moe_shared_expert_intermediate_size
        if self.moe_shared_expert_gate and shared is None:
            raise ValueError(
                "moe_shared_expert_gate needs shared experts; set "
                "moe_shared_expert_intermediate_size, or drop the gate"
            )
        if self.add_bias_linear and shared is not None:
            raise ValueError(
                "add_bias_linear: Megatron's shared experts have no biases; drop one of the two"
            )
        if self.add_qkv_bias and self.multi_latent_attention:
            raise ValueError("add_qkv_bias: latent attention has no such biases; drop it")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size "
                f"({self.hidden_size}); change one, or set kv_channels"
            )
        return self

    @property
    def moe_layers(self) -> list[bool]:
        """Whether each layer is MoE."""
        pattern = self.moe_layer_freq
        if isinstance(pattern, list):
            return [bool(entry) for entry in pattern]
        return [layer % pattern == 0 for layer in range(self.num_layers)]

    @property
    def fc1_parts(self) -> int:
        """Outputs of an MLP's first projection, in widths: gate and up, or up alone."""
        return 2 if self.swiglu else 1

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads
