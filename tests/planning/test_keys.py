"""The grammar of checkpoint keys: what it reads, writes back, and refuses."""

from itertools import product

import pytest

from megatron_growth.errors import CheckpointError
from megatron_growth.planning.keys import (
    LAYER_RULES,
    MTP_RULES,
    OUTSIDE_RULES,
    Rule,
    parse,
    parse_object,
)

STATES = (None, "param", "fp32_param", "exp_avg", "exp_avg_sq")
# text before a layer's name: place, layer, wrapper
LAYER_PLACES = [
    ("decoder.layers.", "decoder", None, ""),
    ("decoder.layers.0.", "decoder", 0, ""),
    ("decoder.layers.17.", "decoder", 17, ""),
    ("mtp.layers.0.transformer_layer.", "mtp", 0, "transformer_layer."),
    ("mtp.layers.1.mtp_model_layer.", "mtp", 1, "mtp_model_layer."),
]
MTP_PLACES = [("mtp.layers.0.", "mtp", 0, ""), ("mtp.layers.12.", "mtp", 12, "")]
OUTSIDE = [("", "outside", None, "")]


def _all_places() -> list:
    tables = ((LAYER_RULES, LAYER_PLACES), (MTP_RULES, MTP_PLACES), (OUTSIDE_RULES, OUTSIDE))
    return [(rule, place) for rules, places in tables for rule, place in product(rules, places)]


# What Megatron 0.17 to 0.19 writes inside a layer, and what growth must do with it: from its
# source, not from our table.
E, N, R = "expert axis", "noise", "residual output"
NAMES = {
    "mlp.experts.experts.linear_fc1.weight": {E, N},
    "mlp.experts.experts.linear_fc2.weight": {E, N, R},
    "mlp.experts.experts.linear_fc1.bias": {E},
    "mlp.experts.experts.linear_fc2.bias": {E, R},
    "mlp.experts.experts.linear_fc1._extra_state": {E, "object"},
    "mlp.experts.experts.linear_fc2._extra_state": {E, "object"},
    "mlp.router.weight": {E, N},
    "mlp.router.bias": {E},
    "mlp.router.expert_bias": {E},
    "mlp.router.qb_beta": {E},
    "mlp.shared_experts.linear_fc1.weight": set(),
    "mlp.shared_experts.linear_fc1.bias": set(),
    "mlp.shared_experts.linear_fc2.weight": {R},
    "mlp.shared_experts.linear_fc2.bias": {R},
    "mlp.shared_experts.gate_weight": set(),
    "mlp.shared_experts.linear_fc1._extra_state": {"object"},
    "mlp.fc1_latent_proj.weight": set(),
    "mlp.fc2_latent_proj.weight": set(),
    "mlp.linear_fc1.weight": set(),
    "mlp.linear_fc1.bias": set(),
    "mlp.linear_fc1.layer_norm_weight": set(),
    "mlp.linear_fc1.layer_norm_bias": set(),
    "mlp.linear_fc1._extra_state": {"object"},
    "mlp.linear_fc2.weight": {R},
    "mlp.linear_fc2.bias": {R},
    "mlp.linear_fc2._extra_state": {"object"},
    "self_attention.linear_qkv.weight": set(),
    "self_attention.linear_qkv.bias": set(),
    "self_attention.linear_qkv.layer_norm_weight": set(),
    "self_attention.linear_qkv.layer_norm_bias": set(),
    "self_attention.linear_qkv._extra_state": {"object"},
    "self_attention.linear_proj.weight": {R},
    "self_attention.linear_proj.bias": {R},
    "self_attention.linear_proj._extra_state": {"object"},
    "self_attention.linear_q_proj.weight": set(),
    "self_attention.linear_q_down_proj.weight": set(),
    "self_attention.linear_q_up_proj.weight": set(),
    "self_attention.linear_q_up_proj.layer_norm_weight": set(),
    "self_attention.linear_kv_down_proj.weight": set(),
    "self_attention.linear_kv_up_proj.weight": set(),
    "self_attention.linear_kv_up_proj.layer_norm_weight": set(),
    "self_attention.linear_kv_up_proj._extra_state": {"object"},
    "self_attention.q_layernorm.weight": set(),
    "self_attention.k_layernorm.bias": set(),
    "self_attention.kv_layernorm.weight": set(),
    "self_attention.core_attention.softmax_offset": set(),
    "self_attention.core_attention._extra_state": {"object"},
    "input_layernorm.weight": set(),
    "input_layernorm.bias": set(),
    "pre_mlp_layernorm.weight": set(),
    "pre_mlp_layernorm._extra_state": {"object"},
}


def _traits(rule: Rule) -> set[str]:
    named = {E: rule.expert_axis, N: rule.noise, R: rule.residual_output, "object": rule.is_object}
    return {name for name, has in named.items() if has}


@pytest.mark.parametrize(
    ("rule", "place"), _all_places(), ids=lambda v: v.example if isinstance(v, Rule) else v[0]
)
def test_every_example_parses_in_every_place_and_state_and_is_written_back(
    rule: Rule, place
) -> None:
    before, kind, layer, wrapper = place
    read = 0
    for state in (None,) if rule.is_object else STATES:
        text = (f"optimizer.state.{state}." if state else "") + before + rule.example
        key = parse(text)
        assert key.rule is rule
        assert (key.name, key.place, key.layer, key.wrapper) == (rule.example, kind, layer, wrapper)
        assert key.state == state
        assert str(key) == text
        assert key.is_stacked == (before == "decoder.layers.")
        read += 1
    assert read == (1 if rule.is_object else len(STATES))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_layer_grows_as_it_must(name: str) -> None:
    assert _traits(parse(f"decoder.layers.{name}").rule) == NAMES[name]
    assert _traits(parse(f"decoder.layers.3.{name}").rule) == NAMES[name]


def test_the_noise_of_experts_and_of_the_router_are_told_apart() -> None:
    noises = {
        name: parse(f"decoder.layers.{name}").rule.noise for name in NAMES if N in NAMES[name]
    }
    assert noises == {
        "mlp.experts.experts.linear_fc1.weight": "experts",
        "mlp.experts.experts.linear_fc2.weight": "experts",
        "mlp.router.weight": "router",
    }


def test_no_rule_shadows_another() -> None:
    """One rule matches each name; only the catch-all of extra states, the last, overlaps the
    experts' own."""
    examined = 0
    for rules in (LAYER_RULES, MTP_RULES, OUTSIDE_RULES):
        names = {rule.example for rule in rules} | (set(NAMES) if rules is LAYER_RULES else set())
        for name in names:
            matching = [rule for rule in rules if rule.pattern.fullmatch(name)]
            if name.startswith("mlp.experts.experts.") and name.endswith("._extra_state"):
                assert len(matching) == 2
                assert matching[0].expert_axis
                assert matching[1] is rules[-1]
            else:
                assert len(matching) == 1, name
            examined += 1
    assert examined >= len(NAMES) + len(OUTSIDE_RULES)


def test_every_rule_matches_its_own_example_first() -> None:
    for rules in (LAYER_RULES, MTP_RULES, OUTSIDE_RULES):
        for rule in rules:
            assert next(r for r in rules if r.pattern.fullmatch(rule.example)) is rule


@pytest.mark.parametrize(
    ("text", "position", "grid"),
    [
        ("decoder.layers.self_attention.linear_qkv._extra_state/shard_2_4", (2,), (4,)),
        (
            "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_2.1_4.8",
            (2, 1),
            (4, 8),
        ),
        ("decoder.layers.3.mlp.experts.experts.linear_fc2._extra_state/shard_10_16", (10,), (16,)),
        ("mtp.layers.0.eh_proj._extra_state/shard_0_1", (0,), (1,)),
        ("rng_state/shard_0.0_2.2", (0, 0), (2, 2)),
        ("rerun_state_machine_state/shard_3_4", (3,), (4,)),
        ("common_state/shard_0_1", (0,), (1,)),
    ],
)
def test_an_object_key_names_its_place_in_a_grid_and_is_written_back(
    text: str, position, grid
) -> None:
    read = parse_object(text)
    assert (read.position, read.grid) == (position, grid)
    assert read.key.rule.is_object
    assert str(read) == text


def test_an_object_without_a_grid_is_one_alone() -> None:
    read = parse_object("output_layer._extra_state")
    assert (read.position, read.grid) == ((), ())


def test_a_layers_object_without_a_grid_is_refused() -> None:
    with pytest.raises(CheckpointError, match="does not say which layer it is of"):
        parse_object("decoder.layers.0.self_attention.linear_qkv._extra_state")


def test_a_key_moves_between_layers_and_states() -> None:
    key = parse("decoder.layers.mlp.router.weight")
    assert str(key.at(5)) == "decoder.layers.5.mlp.router.weight"
    assert (
        str(key.at(5).of("exp_avg")) == "optimizer.state.exp_avg.decoder.layers.5.mlp.router.weight"
    )
    assert key.at(5).of("param").at(None).of(None) == key


def test_a_weight_its_master_and_both_key_forms_share_one_noise_stream() -> None:
    names = {
        parse(text).tensor
        for text in (
            "decoder.layers.mlp.router.weight",
            "decoder.layers.3.mlp.router.weight",
            "optimizer.state.param.decoder.layers.mlp.router.weight",
            "optimizer.state.fp32_param.decoder.layers.2.mlp.router.weight",
        )
    }
    assert names == {"decoder.layers.mlp.router.weight"}


def test_each_mtp_module_has_noise_streams_of_its_own() -> None:
    text = "mtp.layers.{}.transformer_layer.mlp.router.weight"
    assert parse(text.format(0)).tensor == text.format(0)
    assert parse(text.format(1)).tensor == text.format(1)
    assert parse("optimizer.state.param." + text.format(1)).tensor == text.format(1)


_UNKNOWN = (
    "the key grammar (megatron_growth/planning/keys.py) does not know it, so how it should grow is "
    "not known; add a rule there or save the base without it"
)
_DP_RESHARDABLE = (
    "optimizer state of format dp_reshardable is keyed by flat buffers, not by tensors; change it "
    "with `torchrun ... -m megatron_growth.reshard`, train the base with "
    "--dist-ckpt-optim-fully-reshardable, or grow weights only with `optimizer: reset`"
)
_GATHERED = (
    "optimizer state of format dp_zero_gather_scatter is one object for all parameters of a rank; "
    "train the base with --dist-ckpt-optim-fully-reshardable, or grow weights only with "
    "`optimizer: reset`"
)
_NO_RULE = "this optimizer's state has no growth rule; grow weights only with `optimizer: reset`"
_SINGLETON = (
    "experts saved one key each (singleton_local_shards) cannot be grown; save the base with "
    "megatron-core 0.17 to 0.19, which stacks them"
)
_BUFFER = (
    "optimizer.distributed.dp_group_idx_0."
    "gbuf_idx_0.dtype_(torch.float32, torch.float32).bucket_idx_0.param"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("decoder.layers.mlp.mystery.weight", _UNKNOWN),
        ("decoder.layers.3.mlp.router.weights", _UNKNOWN),
        ("decoder.layers.x.mlp.router.weight", _UNKNOWN),
        ("decoder.final_norm.weight", _UNKNOWN),
        ("mtp.layers.0.mlp.router.weight", _UNKNOWN),
        ("mtp.layers.transformer_layer.mlp.router.weight", _UNKNOWN),
        ("encoder.layers.mlp.router.weight", _UNKNOWN),
        ("optimizer.state.momentum.decoder.layers.mlp.router.weight", _NO_RULE),
        ("optimizer.state.exp_avg.mystery", _UNKNOWN),
        ("", _UNKNOWN),
        ("embedding.word_embeddings.weight ", _UNKNOWN),
        (_BUFFER, _DP_RESHARDABLE),
        ("chained_1." + _BUFFER, _DP_RESHARDABLE),
        ("optimizer.distributed.dp_group_idx_1.param_state", _GATHERED),
        ("decoder.layers.3.mlp.experts.experts.0.linear_fc1.weight_w", _SINGLETON),
        ("decoder.layers.mlp.experts.experts.11.linear_fc2.weight", _SINGLETON),
        (
            "optimizer.state.param.decoder.layers.3.mlp.experts.experts.0.linear_fc1.weight_v",
            _SINGLETON,
        ),
    ],
)
def test_a_key_that_is_not_understood_is_refused_with_the_reason(text: str, reason: str) -> None:
    for read in (parse, parse_object):
        with pytest.raises(CheckpointError) as refusal:
            read(text)
        assert str(refusal.value) == f"checkpoint key {text!r} cannot be grown: {reason}"
