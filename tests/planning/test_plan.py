"""The plan: which source box and transform make each box of each target tensor."""

import json
from collections import Counter
from dataclasses import fields, replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_growth.errors import PlanError
from megatron_growth.planning.experts import ExpertMap
from megatron_growth.planning.keys import parse, parse_object
from megatron_growth.planning.layers import LayerMap, explicit, identity, interposition
from megatron_growth.planning.pieces import Box, Copy, Divide, Noise, Park, Stream, Transform, Zero
from megatron_growth.planning.plan import Architecture, GrowthPlan, NoiseScale

FC1 = "mlp.experts.experts.linear_fc1.weight"
FC2 = "mlp.experts.experts.linear_fc2.weight"
ROUTER = "mlp.router.weight"
QKV = "self_attention.linear_qkv.weight"
# A layer's tensor: its shape behind the layer axis, for E experts.
TENSORS = {
    FC1: ("E", 6, 4),
    FC2: ("E", 4, 3),
    ROUTER: ("E", 4),
    "mlp.router.expert_bias": ("E",),
    QKV: (12, 4),
}


def make_plan(
    layers: LayerMap | None = None,
    factor: int = 2,
    *,
    order="interleave",
    num_experts: int = 2,
    source_form="stacked",
    target_form=None,
    **changes,
) -> GrowthPlan:
    layers = layers or interposition(3, target=6)
    experts = ExpertMap(num_experts, factor, order)
    plan = GrowthPlan(
        source=Architecture(layers.num_source, num_experts, 2, source_form),
        target=Architecture(
            layers.num_target, experts.num_target, 2 * factor, target_form or source_form
        ),
        layers=layers,
        experts=experts,
        zero_output=False,
        noise=NoiseScale(0.01, 0.02),
        optimizer="rescale",
        masters=None,
        seed=1234,
    )
    return replace(plan, **changes)


def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def _points(box: Box) -> list[tuple[int, ...]]:
    return list(product(*(range(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))))


@st.composite
def plans(draw: st.DrawFn) -> GrowthPlan:
    num_layers = draw(st.integers(1, 3))
    sources = draw(
        st.permutations(
            [*range(num_layers), *draw(st.lists(st.integers(0, num_layers - 1), max_size=4))]
        )
    )
    return make_plan(
        LayerMap(num_layers, tuple(sources)),
        draw(st.integers(1, 3)),
        order=draw(st.sampled_from(["interleave", "append"])),
        num_experts=draw(st.integers(1, 3)),
        source_form=draw(st.sampled_from(["stacked", "per_layer"])),
        target_form=draw(st.sampled_from(["stacked", "per_layer"])),
        zero_output=draw(st.booleans()),
        masters=draw(st.sampled_from([None, "param", "fp32_param"])),
        arguments=draw(
            st.sampled_from(
                [(), (("moe_router_num_groups", 8), ("moe_router_topk_scaling_factor", 2.5))]
            )
        ),
    )


@st.composite
def targets(draw: st.DrawFn, plan: GrowthPlan) -> tuple[str, tuple[int, ...], Box]:
    """The key of a target tensor, its shape, and a box of it."""
    name = draw(st.sampled_from(list(TENSORS)))
    shape: tuple[int, ...] = tuple(
        plan.target.num_experts if n == "E" else n for n in TENSORS[name]
    )  # type: ignore[misc]
    place = "decoder.layers."
    if plan.target.key_form == "per_layer":
        place += f"{draw(st.integers(0, plan.target.num_layers - 1))}."
    else:
        shape = (plan.target.num_layers, *shape)
    state = draw(st.sampled_from(["", "", "optimizer.state.exp_avg.", "optimizer.state.param."]))
    low = tuple(draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(draw(st.integers(1, n - at)) for n, at in zip(shape, low, strict=True))
    return state + place + name, shape, Box(low, sizes)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_pieces_tile_any_box_exactly(data: st.DataObject) -> None:
    plan = data.draw(plans())
    key, shape, box = data.draw(targets(plan))
    pieces = plan.resolve(key, shape, box)
    covered = Counter(point for piece in pieces for point in _points(piece.target))
    assert covered == Counter(_points(box))
    for piece in pieces:
        assert piece.source.numel == piece.target.numel
        stacked = parse(piece.source_key).is_stacked
        assert len(piece.source.sizes) - len(piece.target.sizes) == stacked - parse(key).is_stacked


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_each_element_comes_from_its_source_layer_and_source_expert(data: st.DataObject) -> None:
    """Element by element, by the definition of the maps, for either key form on either side."""
    plan = data.draw(plans())
    key, shape, box = data.draw(targets(plan))
    parsed = parse(key)
    compared = 0
    for piece in plan.resolve(key, shape, box):
        source_key = parse(piece.source_key)
        for target, source in zip(_points(piece.target), _points(piece.source), strict=True):
            layer, target = (target[0], target[1:]) if parsed.is_stacked else (parsed.layer, target)
            source_layer, source = (
                (source[0], source[1:]) if source_key.is_stacked else (source_key.layer, source)
            )
            assert layer is not None
            assert source_layer == plan.layers.sources[layer]
            if parsed.rule.expert_axis:
                assert source[0] == plan.experts.source(target[0])
                target, source = target[1:], source[1:]
            assert source == target
            compared += 1
    assert compared == box.numel


def test_boxes_intersect_as_sets_of_points_do() -> None:
    assert Box((0, 2), (3, 4)).intersect(Box((1, 0), (9, 3))) == Box((1, 2), (2, 1))
    assert Box((0,), (3,)).intersect(Box((3,), (1,))) is None
    assert Box((), ()).intersect(Box((), ())) == Box((), ())
    assert Box((), ()).numel == 1


# -- transforms ------------------------------------------------------------------------------------


def test_a_clone_gets_noise_and_the_original_its_own_bits() -> None:
    plan = make_plan()
    key, shape = f"decoder.layers.{FC1}", (6, 4, 6, 4)
    original, clone = plan.resolve(key, shape, Box((5, 2, 0, 0), (1, 2, 6, 4)))
    assert (original.source, original.transform) == (Box((2, 1, 0, 0), (1, 1, 6, 4)), Copy())
    assert (clone.source, clone.target) == (original.source, Box((5, 3, 0, 0), (1, 1, 6, 4)))
    assert clone.transform == Noise(
        0.01, Stream(1234, key, 5, 3), Box((2, 1, 0, 0), (1, 1, 6, 4)), 2
    )


def test_sigma_is_of_the_whole_projection_however_small_the_box() -> None:
    (piece,) = make_plan().resolve(
        f"decoder.layers.{FC1}", (6, 4, 6, 4), Box((0, 1, 2, 3), (1, 1, 1, 1))
    )
    assert isinstance(piece.transform, Noise)
    assert piece.transform.scope == Box((0, 0, 0, 0), (1, 1, 6, 4))


def test_router_noise_has_its_own_scale_and_the_sigma_of_the_layers_whole_router() -> None:
    pieces = make_plan().resolve(f"decoder.layers.{ROUTER}", (6, 4, 4), Box((2, 0, 0), (1, 4, 4)))
    assert [type(piece.transform) for piece in pieces] == [Copy, Noise, Copy, Noise]
    noise = pieces[3].transform
    assert noise == Noise(
        0.02, Stream(1234, f"decoder.layers.{ROUTER}", 2, 3), Box((1, 0, 0), (1, 2, 4)), 2
    )


def test_noise_goes_by_the_same_stream_in_both_key_forms() -> None:
    per_layer = make_plan(source_form="per_layer")
    pieces = per_layer.resolve(f"decoder.layers.5.{FC1}", (4, 6, 4), Box((3, 0, 0), (1, 6, 4)))
    assert pieces[0].source_key == f"decoder.layers.2.{FC1}"
    assert pieces[0].transform == Noise(
        0.01, Stream(1234, f"decoder.layers.{FC1}", 5, 3), Box((1, 0, 0), (1, 6, 4)), 1
    )


def test_every_copy_of_a_clone_draws_noise_of_its_own() -> None:
    plan = make_plan(interposition(3, target=9), 3)
    pieces = plan.resolve(f"decoder.layers.{FC1}", (9, 6, 6, 4), _whole((9, 6, 6, 4)))
    streams = [piece.transform.stream for piece in pieces if isinstance(piece.transform, Noise)]
    assert len(streams) == 9 * 2 * 2
    assert len(set(streams)) == len(streams)


def test_an_mtp_module_grows_in_width_and_not_in_depth() -> None:
    key = f"mtp.layers.0.transformer_layer.{FC1}"
    original, clone = make_plan().resolve(key, (4, 6, 4), Box((0, 0, 0), (2, 6, 4)))
    assert (original.source_key, original.transform) == (key, Copy())
    assert clone.source == Box((0, 0, 0), (1, 6, 4))
    assert clone.transform == Noise(0.01, Stream(1234, key, None, 1), Box((0, 0, 0), (1, 6, 4)), 1)


def test_no_noise_scale_means_the_originals_bits() -> None:
    plan = make_plan(noise=NoiseScale(0.0, 0.02))
    pieces = plan.resolve(f"decoder.layers.{FC1}", (6, 4, 6, 4), _whole((6, 4, 6, 4)))
    assert [piece.transform for piece in pieces] == [Copy()] * 24
    router = plan.resolve(f"decoder.layers.{ROUTER}", (6, 4, 4), _whole((6, 4, 4)))
    assert sum(isinstance(piece.transform, Noise) for piece in router) == 12


@pytest.mark.parametrize("name", ["mlp.router.expert_bias", "mlp.experts.experts.linear_fc2.bias"])
def test_expert_biases_are_copied_without_noise(name: str) -> None:
    shape = (6, 4) if "router" in name else (6, 4, 4)
    pieces = make_plan().resolve(f"decoder.layers.{name}", shape, _whole(shape))
    assert [piece.transform for piece in pieces] == [Copy()] * 24


@pytest.mark.parametrize(
    ("state", "optimizer", "factor", "expected"),
    [
        ("exp_avg", "rescale", 2, Divide(2)),
        ("exp_avg", "rescale", 3, Divide(3)),
        ("exp_avg_sq", "rescale", 2, Divide(4)),
        ("exp_avg_sq", "rescale", 3, Divide(9)),
        ("exp_avg", "copy", 3, Copy()),
        ("exp_avg_sq", "copy", 3, Copy()),
        ("exp_avg_sq", "rescale", 1, Copy()),
    ],
)
def test_moments_of_experts_and_router_rows_are_divided_as_their_gradient_is_split(
    state: str, optimizer, factor: int, expected: Copy | Divide
) -> None:
    plan = make_plan(factor=factor, optimizer=optimizer)
    for name in (FC1, FC2, ROUTER):
        shape = (6, *(plan.target.num_experts if n == "E" else n for n in TENSORS[name]))
        pieces = plan.resolve(
            f"optimizer.state.{state}.decoder.layers.{name}", shape, _whole(shape)
        )  # type: ignore[arg-type]
        assert [piece.transform for piece in pieces] == [expected] * (6 * plan.target.num_experts)
    (piece, *_) = plan.resolve(
        f"optimizer.state.{state}.decoder.layers.{QKV}", (6, 12, 4), _whole((6, 12, 4))
    )
    assert piece.transform == Copy()


@pytest.mark.parametrize("order", ["interleave", "append"])
def test_parked_clones_get_a_bias_below_the_layers_range_and_no_momentum(order) -> None:
    plan = replace(make_plan(factor=2), parked=True, experts=ExpertMap(2, 2, order))
    clones = [plan.experts.clone_index(expert) > 0 for expert in range(4)]

    def transforms(state: str, name: str, *tail: int) -> list[Transform]:
        shape = (6, 4, *tail)
        pieces = plan.resolve(f"{state}decoder.layers.{name}", shape, _whole(shape))
        return [piece.transform for piece in pieces]

    parks = transforms("", "mlp.router.expert_bias")
    assert parks[8:12] == [Park(Box((1, 0), (1, 2))) if clone else Copy() for clone in clones]
    stopped = [Zero() if clone else Copy() for clone in clones] * 6
    assert transforms("optimizer.state.exp_avg.", FC1, 6, 4) == stopped
    assert transforms("optimizer.state.exp_avg.", ROUTER, 4) == stopped
    assert transforms("optimizer.state.exp_avg_sq.", FC1, 6, 4) == [Copy()] * 24
    assert [type(made) for made in transforms("", FC1, 6, 4)][:4] == [
        Noise if clone else Copy for clone in clones
    ]
    copied = replace(plan, optimizer="copy")
    (piece, *_) = copied.resolve(
        f"optimizer.state.exp_avg.decoder.layers.{ROUTER}", (6, 4, 4), Box((0, 3, 0), (1, 1, 4))
    )
    assert piece.transform == Copy()
    (mtp,) = plan.resolve(
        "mtp.layers.0.transformer_layer.mlp.router.expert_bias", (4,), Box((3,), (1,))
    )
    assert mtp.transform == Park(Box((0,), (2,)))


def test_depth_copies_keep_their_moments_even_where_their_output_starts_at_zero() -> None:
    plan = make_plan(factor=1, zero_output=True)
    key = "optimizer.state.exp_avg.decoder.layers.self_attention.linear_proj.weight"
    assert {piece.transform for piece in plan.resolve(key, (6, 4, 4), _whole((6, 4, 4)))} == {
        Copy()
    }


@pytest.mark.parametrize("state", ["", "optimizer.state.param.", "optimizer.state.fp32_param."])
@pytest.mark.parametrize(
    ("name", "is_output"),
    [
        ("self_attention.linear_proj.weight", True),
        ("self_attention.linear_proj.bias", True),
        ("mlp.linear_fc2.weight", True),
        ("mlp.shared_experts.linear_fc2.weight", True),
        (QKV, False),
        ("mlp.linear_fc1.weight", False),
        ("input_layernorm.weight", False),
    ],
)
def test_zero_output_zeroes_what_the_copies_write_into_the_residual_stream(
    state: str, name: str, is_output: bool
) -> None:
    plan = make_plan(zero_output=True)
    pieces = plan.resolve(f"{state}decoder.layers.{name}", (6, 4), _whole((6, 4)))
    assert [piece.transform for piece in pieces] == [Copy(), Zero() if is_output else Copy()] * 3


def test_zero_output_silences_the_clones_of_copies_too() -> None:
    pieces = make_plan(zero_output=True).resolve(
        f"decoder.layers.{FC2}", (6, 4, 4, 3), _whole((6, 4, 4, 3))
    )
    assert [type(piece.transform) for piece in pieces] == ([Copy, Noise] * 2 + [Zero] * 4) * 3


def test_with_masters_the_weights_of_clones_are_made_from_them_and_all_else_from_the_weights() -> (
    None
):
    plan = make_plan(masters="param")
    key = f"decoder.layers.{FC1}"
    original, clone = plan.resolve(key, (6, 4, 6, 4), Box((0, 0, 0, 0), (1, 2, 6, 4)))
    assert (original.source_key, clone.source_key) == (key, f"optimizer.state.param.{key}")
    _, master = plan.resolve(
        f"optimizer.state.param.{key}", (6, 4, 6, 4), Box((0, 0, 0, 0), (1, 2, 6, 4))
    )
    assert (master.source_key, master.transform) == (clone.source_key, clone.transform)


def test_what_is_outside_the_layers_is_itself() -> None:
    box = Box((3, 0), (2, 4))
    (piece,) = make_plan().resolve("embedding.word_embeddings.weight", (10, 4), box)
    assert (piece.source_key, piece.source, piece.target) == (
        "embedding.word_embeddings.weight",
        box,
        box,
    )
    assert piece.transform == Copy()


# -- target names and shapes -----------------------------------------------------------------------


def _targets(plan: GrowthPlan, key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {str(k): s for k, s in plan.target_tensors(parse(key), shape)}


def test_depth_grows_axis_0_of_a_stack_and_width_the_expert_axis() -> None:
    assert _targets(make_plan(), f"decoder.layers.{FC1}", (3, 2, 6, 4)) == {
        f"decoder.layers.{FC1}": (6, 4, 6, 4)
    }
    assert _targets(make_plan(), f"decoder.layers.{QKV}", (3, 12, 4)) == {
        f"decoder.layers.{QKV}": (6, 12, 4)
    }
    assert _targets(make_plan(factor=1), f"decoder.layers.{FC1}", (3, 2, 6, 4)) == {
        f"decoder.layers.{FC1}": (6, 2, 6, 4)
    }
    assert _targets(make_plan(identity(3)), f"decoder.layers.{FC1}", (3, 2, 6, 4)) == {
        f"decoder.layers.{FC1}": (3, 4, 6, 4)
    }


def test_depth_grows_the_number_of_per_layer_keys() -> None:
    plan = make_plan(explicit(3, [0, 1, 2, 1]), source_form="per_layer")
    assert _targets(plan, f"decoder.layers.1.{FC1}", (2, 6, 4)) == {
        f"decoder.layers.1.{FC1}": (4, 6, 4),
        f"decoder.layers.3.{FC1}": (4, 6, 4),
    }


def test_either_key_form_grows_into_the_other() -> None:
    unstacked = make_plan(target_form="per_layer")
    assert _targets(unstacked, f"decoder.layers.{QKV}", (3, 12, 4)) == {
        f"decoder.layers.{t}.{QKV}": (12, 4) for t in range(6)
    }
    stacked = make_plan(source_form="per_layer", target_form="stacked")
    assert _targets(stacked, f"decoder.layers.1.{FC1}", (2, 6, 4)) == {
        f"decoder.layers.{FC1}": (6, 4, 6, 4)
    }


def test_outside_and_mtp_tensors_keep_their_keys() -> None:
    plan = make_plan(target_form="per_layer")
    assert _targets(plan, "output_layer.weight", (10, 4)) == {"output_layer.weight": (10, 4)}
    key = f"mtp.layers.0.transformer_layer.{FC1}"
    assert _targets(plan, key, (2, 6, 4)) == {key: (4, 6, 4)}


STATE = "self_attention.linear_qkv._extra_state"
EXPERT_STATE = "mlp.experts.experts.linear_fc1._extra_state"


@pytest.mark.parametrize(
    ("source_form", "target_form", "text", "expected"),
    [
        ("stacked", "stacked", f"decoder.layers.{STATE}/shard_1_3",
         {f"decoder.layers.{STATE}/shard_{t}_6" for t in (2, 3)}),
        ("stacked", "stacked", f"decoder.layers.{EXPERT_STATE}/shard_1.0_3.2",
         {f"decoder.layers.{EXPERT_STATE}/shard_{t}.{e}_6.4" for t in (2, 3) for e in (0, 1)}),
        ("per_layer", "per_layer", f"decoder.layers.1.{STATE}/shard_0_1",
         {f"decoder.layers.{t}.{STATE}/shard_0_1" for t in (2, 3)}),
        ("per_layer", "per_layer", f"decoder.layers.1.{EXPERT_STATE}/shard_1_2",
         {f"decoder.layers.{t}.{EXPERT_STATE}/shard_{e}_4" for t in (2, 3) for e in (2, 3)}),
        ("stacked", "per_layer", f"decoder.layers.{STATE}/shard_1_3",
         {f"decoder.layers.{t}.{STATE}/shard_0_1" for t in (2, 3)}),
        ("stacked", "per_layer", f"decoder.layers.{EXPERT_STATE}/shard_1.0_3.2",
         {f"decoder.layers.{t}.{EXPERT_STATE}/shard_{e}_4" for t in (2, 3) for e in (0, 1)}),
        ("per_layer", "stacked", f"decoder.layers.1.{STATE}/shard_0_1",
         {f"decoder.layers.{STATE}/shard_{t}_6" for t in (2, 3)}),
        ("per_layer", "stacked", f"decoder.layers.1.{EXPERT_STATE}/shard_1_2",
         {f"decoder.layers.{EXPERT_STATE}/shard_{t}.{e}_6.4" for t in (2, 3) for e in (2, 3)}),
        ("stacked", "per_layer", f"mtp.layers.0.transformer_layer.{EXPERT_STATE}/shard_1_2",
         {f"mtp.layers.0.transformer_layer.{EXPERT_STATE}/shard_{e}_4" for e in (2, 3)}),
        ("stacked", "stacked", f"mtp.layers.0.transformer_layer.{STATE}/shard_0_1",
         {f"mtp.layers.0.transformer_layer.{STATE}/shard_0_1"}),
        ("stacked", "stacked", "rng_state/shard_0.1_1.2", {"rng_state/shard_0.1_1.2"}),
        ("per_layer", "stacked", "common_state/shard_0_1", {"common_state/shard_0_1"}),
    ],
)  # fmt: skip
def test_objects_move_with_their_layers_and_experts(
    source_form, target_form, text: str, expected: set[str]
) -> None:
    plan = make_plan(source_form=source_form, target_form=target_form)
    assert {str(target) for target in plan.target_objects(parse_object(text))} == expected


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (
            f"decoder.layers.{QKV}",
            (4, 12, 4),
            f"decoder.layers.{QKV} stacks 4 layers but the model has 3; "
            "the checkpoint's tensors and arguments disagree",
        ),
        (
            f"decoder.layers.{FC1}",
            (3, 5, 6, 4),
            f"decoder.layers.{FC1} has 5 experts but the model has 2; "
            "layers with different numbers of experts cannot be grown",
        ),
    ],
)
def test_a_tensor_that_contradicts_the_model_is_refused(
    key: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(PlanError) as refusal:
        _targets(make_plan(), key, shape)
    assert str(refusal.value) == message


# -- JSON ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(plans())
def test_a_plan_survives_json(plan: GrowthPlan) -> None:
    again = GrowthPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.fingerprint == plan.fingerprint


def test_a_plan_of_another_version_is_refused() -> None:
    text = json.dumps({**json.loads(make_plan().to_json()), "version": 99})
    with pytest.raises(PlanError) as refusal:
        GrowthPlan.from_json(text)
    assert str(refusal.value) == (
        "the plan is of version 99 but this megatron_growth reads version 1; "
        "read it with the version that wrote it"
    )


def test_the_fingerprint_changes_with_every_field() -> None:
    plan = make_plan()
    architecture = [{"num_layers": 9}, {"num_experts": 9}, {"top_k": 9}, {"key_form": "per_layer"}]
    experts = [{"num_source": 3}, {"factor": 3}, {"order": "append"}]
    changes = {
        "source": [replace(plan.source, **change) for change in architecture],
        "target": [replace(plan.target, **change) for change in architecture],
        "layers": [LayerMap(3, (0, 1, 2, 0, 1, 2)), LayerMap(4, plan.layers.sources)],
        "experts": [replace(plan.experts, **change) for change in experts],
        "zero_output": [True],
        "noise": [NoiseScale(0.011, 0.02), NoiseScale(0.01, 0.021)],
        "optimizer": ["copy", "reset"],
        "masters": ["param", "fp32_param"],
        "seed": [1235],
        "arguments": [(("moe_router_num_groups", 8),), (("moe_router_num_groups", 9),)],
        "parked": [True],
    }
    assert [set(change) for change in architecture] == [{f.name} for f in fields(Architecture)]
    assert set(changes) == {f.name for f in fields(GrowthPlan)}
    changed = [
        replace(plan, **{name: value}).fingerprint
        for name, values in changes.items()
        for value in values
    ]
    assert len({plan.fingerprint, *changed}) == 1 + len(changed)


def test_the_fingerprint_is_a_matter_of_the_plan_alone() -> None:
    """Pinned: a plan written yesterday has the same fingerprint today, in every process."""
    assert make_plan().fingerprint == make_plan().fingerprint
    assert (
        make_plan().fingerprint
        == "159fce167c07e683ff1249b978dacd225af1cda7686c7463ef347ff252d96b76"
    )
