"""The base's router, as far as its function under growth goes, read from Megatron's arguments."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Router:
    """The base's router, as far as its function under growth goes; the defaults are upstream's.

    Attributes:
        num_experts: experts.
        top_k: experts that each token is sent to.
        score_function: what makes logits scores.
        pre_softmax: softmax over all experts rather than over those taken.
        num_groups: groups of experts, None without.
        group_topk: groups that each token may use; None turns groups off.
        scaling_factor: of the weights.
        balancing: load balancing types.
        z_loss_coeff: of the z-loss, None without.
        expert_bias: whether a bias takes part in the selection (aux-loss-free balancing).
        bias_update_rate: by which each step moves the bias of an expert with too many or too few
            tokens.
        aux_loss: whether an auxiliary loss has a coefficient.
        half_precision: whether logits are computed in 16 bits.
        probs_on_input: whether weights multiply the experts' input.
        capacity_factor: of the tokens an expert takes, None without a limit.
    """

    num_experts: int
    top_k: int = 2
    score_function: str = "softmax"
    pre_softmax: bool = False
    num_groups: int | None = None
    group_topk: int | None = None
    scaling_factor: float | None = None
    balancing: tuple[str, ...] = ("aux_loss",)
    z_loss_coeff: float | None = None
    expert_bias: bool = False
    bias_update_rate: float = 1e-3
    aux_loss: bool = False
    half_precision: bool = False
    probs_on_input: bool = False
    capacity_factor: float | None = None

    @property
    def is_sinkhorn(self) -> bool:
        """Sinkhorn has scores of its own and knows no groups."""
        return "sinkhorn" in self.balancing

    @property
    def is_grouped(self) -> bool:
        return bool(self.group_topk) and not self.is_sinkhorn

    @property
    def selects_by_bias(self) -> bool:
        """Sinkhorn and quantile balancing select in ways of their own."""
        return self.expert_bias and not set(self.balancing) & {"sinkhorn", "quantile_balancing"}

    @property
    def normalizes(self) -> bool:
        """Scores are divided by their sum, but only those of more than one expert."""
        return self.score_function != "softmax" and not self.is_sinkhorn

    @property
    def spreads_weight(self) -> bool:
        """Weights are shares of all experts, so that each of m clones has 1/m."""
        return self.score_function == "softmax" and self.pre_softmax and not self.is_sinkhorn


# Megatron argument -> field of a `Router` that it is as it stands.
_FIELDS = {
    "num_experts": "num_experts",
    "moe_router_topk": "top_k",
    "moe_router_score_function": "score_function",
    "moe_router_pre_softmax": "pre_softmax",
    "moe_router_num_groups": "num_groups",
    "moe_router_group_topk": "group_topk",
    "moe_router_topk_scaling_factor": "scaling_factor",
    "moe_z_loss_coeff": "z_loss_coeff",
    "moe_router_enable_expert_bias": "expert_bias",
    "moe_router_bias_update_rate": "bias_update_rate",
    "moe_apply_probs_on_input": "probs_on_input",
    "moe_expert_capacity_factor": "capacity_factor",
}


def read_router(args: object | None) -> Router | None:
    """The router that Megatron's arguments describe; None without arguments or without experts."""
    if not getattr(args, "num_experts", None):
        return None
    given = {name: value for name, value in vars(args).items() if value is not None}
    fields = {field: given[name] for name, field in _FIELDS.items() if name in given}
    if "moe_router_load_balancing_type" in given:
        types = given["moe_router_load_balancing_type"]
        fields["balancing"] = (types,) if isinstance(types, str) else tuple(types)
    coefficients = given.get("moe_aux_loss_coeff", 0.0)
    fields["aux_loss"] = any(coefficients if isinstance(coefficients, list) else [coefficients])
    in_half = bool(given.get("bf16") or given.get("fp16"))
    return Router(**fields, half_precision=in_half and "moe_router_dtype" not in given)
