"""The grown view of a whole checkpoint equals the definition: tensors to the bit, objects, common
state."""

import hashlib
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_growth import GrowthConfig, GrowthPlan, GrowthStorageReader
from megatron_growth.checkpoint import fanout, values
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.errors import CheckpointError, PlanError
from megatron_growth.planning.build import build_plan
from tests.checkpoint import bases, definition
from tests.checkpoint.bases import COMMON_STATE, Model
from tests.checkpoint.definition import Growth, appended, interleaved
from tests.checkpoint.loading import RecordingReader, load_all, load_boxes, load_tensors

DISTRIBUTED = ("param", "exp_avg", "exp_avg_sq")  # distributed optimizer
MIXED = ("fp32_param", "exp_avg", "exp_avg_sq")  # plain bf16 optimizer
ADAM = ("exp_avg", "exp_avg_sq")  # plain fp32 optimizer

BOTH: dict[str, Any] = {"depth": {"factor": 2}, "width": {"factor": 2}}
PARKED: dict[str, Any] = {"factor": 2, "top_k": "keep", "clones": "parked"}
PER_LAYER = Model(stacked=False, dense=(0,))

# name: base, configuration, the same growth written out
CASES: dict[str, tuple[Model, dict[str, Any], Growth]] = {
    "depth alone": (
        Model(),
        {"depth": {"factor": 2}},
        Growth((0, 0, 1, 1, 2, 2), interleaved(3, 1)),
    ),
    "width alone": (
        Model(),
        {"width": {"factor": 2}},
        Growth((0, 1, 2), interleaved(3, 2)),
    ),
    "both, with the distributed optimizer": (
        Model(states=DISTRIBUTED),
        BOTH,
        Growth((0, 0, 1, 1, 2, 2), interleaved(3, 2)),
    ),
    "both, with the plain bf16 optimizer": (
        Model(states=MIXED),
        BOTH,
        Growth((0, 0, 1, 1, 2, 2), interleaved(3, 2)),
    ),
    "both in fp32, without masters": (
        Model(dtype=torch.float32, states=ADAM),
        BOTH,
        Growth((0, 0, 1, 1, 2, 2), interleaved(3, 2)),
    ),
    "three clones appended, moments copied": (
        Model(states=DISTRIBUTED),
        {"width": {"factor": 3, "order": "append"}, "optimizer": "copy", "seed": 7},
        Growth((0, 1, 2), appended(3, 3), optimizer="copy", seed=7),
    ),
    "three clones, moments rescaled": (
        Model(states=DISTRIBUTED, layers=2),
        {"width": {"factor": 3}},
        Growth((0, 1), interleaved(3, 3)),
    ),
    "optimizer reset: noise goes on the weights": (
        Model(states=DISTRIBUTED),
        {**BOTH, "optimizer": "reset"},
        Growth((0, 0, 1, 1, 2, 2), interleaved(3, 2), optimizer="reset"),
    ),
    "stacking with zero outputs": (
        Model(states=DISTRIBUTED),
        {"depth": {"method": "stacking", "new_layer_init": "zero_output"}, "width": {}},
        Growth((0, 1, 2, 0, 1, 2), interleaved(3, 2), zero_output=True),
    ),
    "a map, other noise scales": (
        Model(states=MIXED),
        {
            "depth": {"method": "map", "map": [2, 0, 1, 0, 2]},
            "width": {"noise": {"experts": 0.3, "router": 0}},
        },
        Growth((2, 0, 1, 0, 2), interleaved(3, 2), alpha=(("experts", 0.3), ("router", 0.0))),
    ),
    "no noise on experts, some on the router": (
        Model(dtype=torch.float32),
        {"width": {"noise": {"experts": 0, "router": 1}}},
        Growth((0, 1, 2), interleaved(3, 2), alpha=(("experts", 0.0), ("router", 1.0))),
    ),
    "skipped ends": (
        Model(layers=4, experts=2),
        {"depth": {"factor": 3, "skip_first": 1, "skip_last": 1}, "width": {}},
        Growth((0, 1, 1, 1, 2, 2, 2, 3), interleaved(2, 2)),
    ),
    "per-layer keys, dense first": (
        PER_LAYER,
        BOTH,
        Growth((0, 0, 1, 1, 2, 2), interleaved(3, 2), stacked=False),
    ),
    "per-layer keys, with optimizer, appended, stacked twice": (
        Model(stacked=False, dense=(0, 2), states=DISTRIBUTED),
        {"depth": {"method": "stacking"}, "width": {"order": "append"}},
        Growth((0, 1, 2, 0, 1, 2), appended(3, 2), stacked=False),
    ),
    "per-layer keys, zero outputs": (
        Model(stacked=False, dense=(0,), states=MIXED),
        {"depth": {"new_layer_init": "zero_output"}, "width": {}},
        Growth((0, 0, 1, 1, 2, 2), interleaved(3, 2), stacked=False, zero_output=True),
    ),
    "clones parked": (
        Model(states=DISTRIBUTED),
        {"depth": {"factor": 2}, "width": PARKED},
        Growth((0, 0, 1, 1, 2, 2), interleaved(3, 2), parked=True),
    ),
    "three clones parked, appended, moments copied, per-layer keys": (
        Model(stacked=False, dense=(0,), states=MIXED),
        {"width": {**PARKED, "factor": 3, "order": "append"}, "optimizer": "copy"},
        Growth((0, 1, 2), appended(3, 3), optimizer="copy", stacked=False, parked=True),
    ),
    "clones parked, optimizer reset": (
        Model(dtype=torch.float32, states=ADAM),
        {"width": PARKED, "optimizer": "reset"},
        Growth((0, 1, 2), interleaved(3, 2), optimizer="reset", parked=True),
    ),
    "a dense model": (
        Model(experts=0),
        {"depth": {"target_layers": 5}},
        Growth((0, 1, 1, 2, 2), ()),
    ),
}
GRIDS = {
    "whole tensors": None,
    "as Megatron": bases.megatron(),
    "uneven": bases.every([2, 2, 5, 3]),
}
# Every case is cut as Megatron cuts it, and a few in the other ways too.
CASES_AND_GRIDS = [(case, "as Megatron") for case in CASES] + [
    (case, grid)
    for case in (
        "both, with the plain bf16 optimizer",
        "a map, other noise scales",
        "per-layer keys, dense first",
        "clones parked",
    )
    for grid in ("whole tensors", "uneven")
]


def _save(
    directory: Path, model: Model, grid: Any = None
) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    tensors, objects = bases.tensors(model), bases.objects(model)
    return bases.save(directory, {**tensors, **objects}, grid), tensors, objects


def _assert_equal(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], at_least: int = 1
) -> None:
    assert got.keys() == want.keys()
    compared = 0
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(got[key], tensor), key
        compared += tensor.numel()
    assert compared > at_least


@pytest.mark.parametrize(("case", "grid"), CASES_AND_GRIDS)
def test_the_grown_checkpoint_equals_the_definition(tmp_path: Path, case: str, grid: str) -> None:
    model, config, growth = CASES[case]
    directory, tensors, objects = _save(tmp_path, model, GRIDS[grid])
    reader = GrowthStorageReader(directory, GrowthConfig.model_validate(config))
    got, got_objects = load_all(reader)
    want = definition.grown_tensors(tensors, growth)
    _assert_equal(
        got,
        want,
        at_least=sum(t.numel() for k, t in tensors.items() if not k.startswith("optimizer")),
    )
    want_objects = definition.grown_objects(objects, growth, model.layers, model.experts)
    assert got_objects.keys() == want_objects.keys()
    assert len(want_objects) > len(growth.layers)
    for key in want_objects.keys() - {COMMON_STATE}:
        assert got_objects[key] == want_objects[key]


@pytest.mark.parametrize(
    "case", ["both, with the distributed optimizer", "per-layer keys, dense first"]
)
def test_originals_keep_the_bases_bits_and_every_clone_differs_a_little(
    tmp_path: Path, case: str
) -> None:
    """What the definition says, held to what the paper says."""
    model, config, _ = CASES[case]
    directory, tensors, _ = _save(tmp_path, model)
    got, _ = load_all(GrowthStorageReader(directory, GrowthConfig.model_validate(config)))
    place = "decoder.layers." if model.stacked else "decoder.layers.1."
    for name in (bases.FC1, bases.FC2, bases.ROUTER):
        source = tensors[place + name][1] if model.stacked else tensors[place + name]
        targets = (
            got[place + name][2:4]
            if model.stacked
            else torch.stack([got[f"decoder.layers.{t}.{name}"] for t in (2, 3)])
        )
        assert torch.equal(targets[0, 0::2], source)
        assert torch.equal(targets[1, 0::2], source)
        noise = (targets[:, 1::2].float() - source.float()).flatten(1)
        assert 0 < noise.abs().max() < 0.2 * source.float().std()
        assert not torch.equal(noise[0], noise[1])


# base form, target form
CROSSINGS = [("stacked", "per_layer"), ("per_layer", "stacked")]


def test_parked_clones_are_below_every_original_and_in_the_originals_order(tmp_path: Path) -> None:
    _save(tmp_path, Model(states=DISTRIBUTED), bases.megatron())
    growth = GrowthConfig.model_validate({"width": {**PARKED, "factor": 3}})
    (bias,) = load_tensors(
        GrowthStorageReader(tmp_path, growth), "decoder.layers.mlp.router.expert_bias"
    )
    by_clone = bias.view(3, 3, 3)  # layer, expert, clone
    originals, clones = by_clone[:, :, :1], by_clone[:, :, 1:]
    assert (clones.amax((1, 2)) + 1 < originals.amin((1, 2))).all()
    assert torch.equal(clones.argsort(1), originals.argsort(1).expand_as(clones))


@pytest.mark.parametrize("added", [[1e9] * 3, [0, 0, float("inf")], [0, float("nan"), 0]])
def test_biases_that_leave_no_room_for_parking_are_refused(tmp_path: Path, added: Any) -> None:
    tensors = bases.tensors(Model())
    tensors["decoder.layers.mlp.router.expert_bias"][1] += torch.tensor(added)
    state = {**tensors, **bases.objects(Model())}
    bases.save(tmp_path, state, bases.every([1, 2]))
    reader = GrowthStorageReader(tmp_path, GrowthConfig.model_validate({"width": PARKED}))
    with pytest.raises(CheckpointError) as refusal:
        load_boxes(reader, [("decoder.layers.mlp.router.expert_bias", (1, 1), (1, 1))])
    assert "cannot place clones below every original; use `clones: active`" in str(refusal.value)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("source_form", "target_form"), CROSSINGS)
def test_either_key_form_is_served_as_the_other(
    tmp_path: Path, source_form, target_form, grid: str
) -> None:
    model = Model(stacked=source_form == "stacked", states=DISTRIBUTED)
    directory, tensors, objects = _save(tmp_path, model, GRIDS[grid])
    config = GrowthConfig.model_validate({"depth": {"new_layer_init": "zero_output"}, "width": {}})
    source = SourceCheckpoint(directory)
    plan = build_plan(config, source.architecture, masters=source.masters, target_form=target_form)
    got, got_objects = load_all(GrowthStorageReader(directory, plan))
    growth = Growth(
        (0, 0, 1, 1, 2, 2), interleaved(3, 2), zero_output=True, stacked=target_form == "stacked"
    )
    _assert_equal(got, definition.grown_tensors(tensors, growth))
    want = definition.grown_objects(objects, growth, model.layers, model.experts)
    assert got_objects.keys() == want.keys()
    assert all(got_objects[key] == want[key] for key in want.keys() - {COMMON_STATE})


def test_layers_that_differ_cannot_be_stacked(tmp_path: Path) -> None:
    directory, *_ = _save(tmp_path, PER_LAYER)
    source = SourceCheckpoint(directory)
    plan = build_plan(GrowthConfig.model_validate(BOTH), source.architecture, target_form="stacked")
    with pytest.raises(PlanError) as refusal:
        _ = GrowthStorageReader(directory, plan).view.shapes
    assert "of 3 layers, so layers cannot be stacked" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("form", ["stacked", "per_layer"])
def test_the_weight_of_a_clone_is_the_cast_of_its_grown_master(tmp_path: Path, form: str) -> None:
    """Otherwise the optimizer's first step would undo the noise, or most of it would be lost in
    bf16."""
    model = Model(stacked=form == "stacked", states=DISTRIBUTED)
    directory, *_ = _save(tmp_path, model, bases.megatron())
    got, _ = load_all(GrowthStorageReader(directory, GrowthConfig.model_validate(BOTH)))
    masters = {
        key: tensor for key, tensor in got.items() if key.startswith("optimizer.state.param.")
    }
    for key, master in masters.items():
        assert torch.equal(got[key.removeprefix("optimizer.state.param.")], master.bfloat16()), key
    assert len(masters) > 20


def test_both_key_forms_grow_to_the_same_numbers(tmp_path: Path) -> None:
    stacked = bases.tensors(Model(states=ADAM))
    apart = {key: tensor for key, tensor in stacked.items() if "decoder.layers." not in key}
    for key, tensor in stacked.items():
        if "decoder.layers." in key:
            apart.update(
                (key.replace("decoder.layers.", f"decoder.layers.{i}."), t.clone())
                for i, t in enumerate(tensor)
            )
    config = GrowthConfig.model_validate(BOTH)
    one, _ = load_all(GrowthStorageReader(bases.save(tmp_path / "one", stacked), config))
    other, _ = load_all(GrowthStorageReader(bases.save(tmp_path / "other", apart), config))
    compared = 0
    for key, tensor in one.items():
        for layer in range(6) if "decoder.layers." in key else [None]:
            if layer is None:
                assert torch.equal(other[key], tensor)
            else:
                assert torch.equal(
                    other[key.replace("decoder.layers.", f"decoder.layers.{layer}.")], tensor[layer]
                )
            compared += 1
    assert compared == len(other)


@pytest.mark.parametrize("grid", [bases.megatron(), bases.every([2, 1, 3])])
def test_the_bits_do_not_depend_on_how_the_base_was_sharded(tmp_path: Path, grid) -> None:
    model, config = Model(states=("param",), layers=2), GrowthConfig.model_validate(BOTH)
    one, *_ = _save(tmp_path / "whole", model)
    other, *_ = _save(tmp_path / "cut", model, grid)
    _assert_equal(
        load_all(GrowthStorageReader(one, config))[0],
        load_all(GrowthStorageReader(other, config))[0],
    )


def test_the_bits_do_not_depend_on_how_much_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, tensors, _ = _save(tmp_path, Model(states=DISTRIBUTED), bases.megatron())
    monkeypatch.setattr(fanout, "BATCH_BYTES", 100)
    base = RecordingReader(directory)
    got, _ = load_all(GrowthStorageReader(directory, GrowthConfig.model_validate(BOTH), base=base))
    _assert_equal(
        got, definition.grown_tensors(tensors, CASES["both, with the distributed optimizer"][2])
    )
    assert len(base.calls) > 100


@pytest.mark.parametrize("form", ["stacked", "per_layer"])
def test_the_bits_do_not_depend_on_how_much_is_transformed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    model = Model(stacked=form == "stacked", states=DISTRIBUTED)
    directory, *_ = _save(tmp_path, model, GRIDS["uneven"])
    config = GrowthConfig.model_validate(BOTH)
    want, _ = load_all(GrowthStorageReader(directory, config))
    monkeypatch.setattr(values, "_BLOCK", 5)
    got, _ = load_all(GrowthStorageReader(directory, config))
    _assert_equal(got, want)


def test_a_tensor_of_a_grown_checkpoint_loads_alone(tmp_path: Path) -> None:
    directory, tensors, _ = _save(tmp_path, Model(states=DISTRIBUTED), bases.megatron())
    reader = GrowthStorageReader(directory, GrowthConfig.model_validate(BOTH))
    (got,) = load_tensors(reader, f"decoder.layers.{bases.FC1}")
    want = definition.grown_tensors(tensors, CASES["both, with the distributed optimizer"][2])
    assert torch.equal(got, want[f"decoder.layers.{bases.FC1}"])


# -- the common state


@pytest.mark.parametrize("from_plan", [False, True])
def test_the_common_state_describes_the_grown_model(tmp_path: Path, from_plan: bool) -> None:
    directory, *_ = _save(tmp_path, PER_LAYER)
    growth: GrowthConfig | GrowthPlan = GrowthConfig.model_validate(BOTH)
    if from_plan:
        growth = build_plan(growth, SourceCheckpoint(directory).architecture)
    _, objects = load_all(GrowthStorageReader(directory, growth))
    (state,) = objects[COMMON_STATE]
    args = state["args"]
    assert (args.num_layers, args.encoder_num_layers, args.num_experts, args.moe_router_topk) == (
        6,
        6,
        6,
        4,
    )
    assert args.moe_layer_freq == [0, 0, 1, 1, 1, 1]
    assert args.hidden_size == PER_LAYER.hidden
    assert (state["iteration"], state["checkpoint_version"]) == (7, 3.0)
    assert state["optimizer"] == {"param_groups": [1]}


def test_a_reset_optimizer_leaves_the_common_state_without_one(tmp_path: Path) -> None:
    directory, *_ = _save(tmp_path, Model(states=ADAM))
    _, objects = load_all(
        GrowthStorageReader(directory, GrowthConfig.model_validate({**BOTH, "optimizer": "reset"}))
    )
    (state,) = objects[COMMON_STATE]
    assert "optimizer" not in state
    assert state["iteration"] == 7


def test_the_bases_own_common_state_is_not_changed(tmp_path: Path) -> None:
    directory, _, objects = _save(tmp_path, PER_LAYER)
    reader = GrowthStorageReader(directory, GrowthConfig.model_validate(BOTH))
    load_all(reader)
    assert reader.source.common_state == objects[COMMON_STATE][0]


# -- metadata


class _Counted(list):
    """A list that counts how many of its elements were looked at."""

    seen = 0

    def __iter__(self):
        for element in super().__iter__():
            _Counted.seen += 1
            yield element


class _CountingReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = super().read_metadata(*args, **kwargs)
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.chunks = _Counted(entry.chunks)
        return metadata


def _looks_per_chunk(directory: Path, model: Model) -> float:
    key, shape = (
        f"decoder.layers.{bases.FC1}",
        (model.layers, model.experts, 2 * model.ffn, model.hidden),
    )
    bases.save(directory, {key: torch.zeros(shape)}, bases.every([1, 1, 2]), num_files=1)
    base = _CountingReader(directory)
    _Counted.seen = 0
    reader = GrowthStorageReader(directory, GrowthConfig.model_validate(BOTH), base=base)
    num_chunks = bases.num_chunks(bases.every([1, 1, 2]), key, shape)
    assert len(reader.view.chunked_metadata().state_dict_metadata[key].chunks) == 4 * num_chunks  # type: ignore[union-attr]
    return _Counted.seen / num_chunks


def test_making_the_metadata_looks_at_each_source_chunk_a_fixed_number_of_times(
    tmp_path: Path,
) -> None:
    small = _looks_per_chunk(tmp_path / "small", Model(layers=2, experts=2))
    large = _looks_per_chunk(tmp_path / "large", Model(layers=8, experts=6))
    assert 0 < large == small


def test_what_the_planner_sees_is_one_chunk_a_tensor(tmp_path: Path) -> None:
    directory, *_ = _save(tmp_path, Model(states=ADAM), GRIDS["uneven"])
    metadata = GrowthStorageReader(directory, GrowthConfig.model_validate(BOTH)).read_metadata()
    assert metadata.storage_data == {}
    examined = 0
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            (chunk,) = entry.chunks
            assert (tuple(chunk.offsets), chunk.sizes) == ((0,) * len(entry.size), entry.size)
            examined += 1
    assert examined > 30


@pytest.mark.parametrize(("source_form", "target_form"), [*CROSSINGS, ("stacked", "stacked")])
@pytest.mark.parametrize("grid", GRIDS)
def test_target_chunks_tile_every_tensor_and_alias_their_source_chunks(
    tmp_path: Path, source_form, target_form, grid: str
) -> None:
    model = Model(stacked=source_form == "stacked", states=ADAM)
    directory, *_ = _save(tmp_path, model, GRIDS[grid])
    source = SourceCheckpoint(directory)
    plan = build_plan(
        GrowthConfig.model_validate(BOTH), source.architecture, target_form=target_form
    )
    view = GrownView(source, plan)
    places = {key: torch.zeros(shape, dtype=torch.int32) for key, shape in view.shapes.items()}
    for text, tensor in source.tensors.items():
        for chunk, key, box in view.target_chunks(tensor):
            pieces = view.resolve(key, box)
            assert len(pieces) in (1, 6)  # one expert, or all of them
            for piece in pieces:
                assert piece.source_key in (text, text.replace("optimizer.state.exp_avg.", ""))
                assert chunk.intersect(piece.source) == piece.source
            places[key][_slices(box)] += 1
    assert len(places) > 30
    assert all(bool((place == 1).all()) for place in places.values())
    chunked = view.chunked_metadata().state_dict_metadata
    assert {key: entry.size for key, entry in chunked.items() if key in places} == {
        key: torch.Size(shape) for key, shape in view.shapes.items()
    }
    for key, place in places.items():
        for chunk in chunked[key].chunks:  # type: ignore[union-attr]
            place[_slices(chunk)] -= 1
        assert bool((place == 0).all())


def _slices(box: Any) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))


class _CachingReader(FileSystemReader):
    """Gives the same metadata each time, as Megatron's cached reader does."""

    cached: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.cached = self.cached or super().read_metadata(*args, **kwargs)
        return self.cached


def test_metadata_that_the_bases_reader_shares_is_not_changed(tmp_path: Path) -> None:
    directory, *_ = _save(tmp_path, Model(states=ADAM), bases.megatron())
    base = _CachingReader(directory)
    before = pickle.dumps(base.read_metadata())
    reader = GrowthStorageReader(directory, GrowthConfig.model_validate(BOTH), base=base)
    load_all(reader)
    reader.read_metadata().state_dict_metadata.clear()
    assert pickle.dumps(base.read_metadata()) == before
    assert len(reader.read_metadata().state_dict_metadata) > 30


# -- the base is read and never written


def _digest(directory: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_the_base_is_untouched_and_may_be_read_only(tmp_path: Path) -> None:
    directory, *_ = _save(tmp_path / "base", Model(states=DISTRIBUTED), bases.megatron())
    before = _digest(directory)
    assert len(before) == 4
    for path in [*directory.iterdir(), directory]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        tensors, objects = load_all(
            GrowthStorageReader(directory, GrowthConfig.model_validate(BOTH))
        )
    finally:
        directory.chmod(0o755)
    assert tensors
    assert objects
    assert _digest(directory) == before
    assert os.listdir(tmp_path) == ["base"]


# -- what a loader may get wrong


def test_a_reader_stays_with_its_own_checkpoint(tmp_path: Path) -> None:
    directory, *_ = _save(tmp_path / "base", Model())
    reader = GrowthStorageReader(directory, GrowthConfig.model_validate(BOTH))
    reader.reset()
    reader.reset(directory)
    assert reader.checkpoint_id == directory
    with pytest.raises(CheckpointError, match="make another one"):
        reader.reset(tmp_path / "other")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("grid", [None, bases.megatron()])
def test_values_that_are_not_finite_cannot_scale_noise(tmp_path: Path, value: float, grid) -> None:
    key = f"decoder.layers.{bases.FC1}"
    tensors = bases.tensors(Model())
    tensors[key][1, 2, -1, -1] = value
    bases.save(tmp_path, tensors, grid)
    reader = GrowthStorageReader(tmp_path, GrowthConfig.model_validate({"width": {}}))
    with pytest.raises(CheckpointError) as refusal:
        load_boxes(reader, [(key, (1, 5, 0, 0), (1, 1, 8, 4))])
    assert "not finite" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    (got,) = load_boxes(
        reader, [(key, (1, 0, 0, 0), (1, 4, 8, 4))]
    )  # the layer's other experts are finite
    assert torch.equal(got[0, 0::2], tensors[key][1, :2])
    assert got.isfinite().all()


@pytest.mark.parametrize("state", ["param", "fp32_param"])
@pytest.mark.parametrize("name", [bases.FC1, "self_attention.linear_qkv.weight"])
def test_a_master_that_does_not_round_to_its_weight_is_refused_and_reset_does_without(
    tmp_path, state: str, name: str
) -> None:
    """Megatron-core 0.19.0 to 0.19.2 can save masters shifted; one element is enough to tell."""
    model, key = (
        Model(layers=2, experts=2, mtp=False, states=(state, "exp_avg")),
        f"decoder.layers.{name}",
    )
    tensors = bases.tensors(model)
    tensors[f"optimizer.state.{state}.{key}"].view(-1)[-1] *= 1.1
    bases.save(tmp_path, tensors, bases.megatron())
    reader = GrowthStorageReader(tmp_path, GrowthConfig.model_validate(BOTH))
    shape = reader.view.shapes[key]
    with pytest.raises(CheckpointError) as refusal:
        load_boxes(reader, [(f"optimizer.state.{state}.{key}", (0,) * len(shape), shape)])
    assert str(refusal.value).startswith(
        f"optimizer.state.{state}.{key} does not round to {key} in box (1, "
    )
    assert "`optimizer: reset`" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    config = {**BOTH, "optimizer": "reset"}
    got, _ = load_all(GrowthStorageReader(tmp_path, GrowthConfig.model_validate(config)))
    growth = Growth((0, 0, 1, 1), interleaved(2, 2), optimizer="reset")
    _assert_equal(got, definition.grown_tensors(tensors, growth))


def test_a_weight_without_a_master_beside_weights_that_have_one_grows_from_itself(
    tmp_path: Path,
) -> None:
    """A frozen router, or one kept in fp32 under the plain bf16 optimizer."""
    model, key = (
        Model(layers=2, experts=2, mtp=False, states=MIXED),
        f"decoder.layers.{bases.ROUTER}",
    )
    tensors = {k: t for k, t in bases.tensors(model).items() if not (k.endswith(key) and k != key)}
    bases.save(tmp_path, tensors)
    reader = GrowthStorageReader(tmp_path, GrowthConfig.model_validate({"width": {}}))
    (got,) = load_boxes(reader, [(key, (0, 0, 0), (2, 4, 4))])
    want = definition.grown_tensors(tensors, Growth((0, 1), interleaved(2, 2)))
    assert torch.equal(got, want[key])
