"""Verification passes what is exactly the grown checkpoint, and names what is wrong with anything
else.

Each grown checkpoint here is the view, loaded through DCP and saved again; each mutation changes
one thing.
"""

import ast
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_growth import GrowthConfig, GrowthPlan, GrowthStorageReader, cli
from megatron_growth.checkpoint import fanout, manifest
from megatron_growth.checkpoint import values as growth_values
from megatron_growth.checkpoint.directory import TRACKER
from megatron_growth.checkpoint.verify import Problem, Verification, values, verify
from megatron_growth.errors import CheckpointError, ConfigError
from megatron_growth.planning import keys, plan
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.pieces import Noise
from tests.checkpoint import bases, definition
from tests.checkpoint.bases import COMMON_STATE, FC1, FC2, ROUTER, Model
from tests.checkpoint.loading import RecordingReader, load_all
from tests.checkpoint.test_view import CASES, PARKED

STATES = ("param", "exp_avg", "exp_avg_sq")
BOTH: dict[str, Any] = {"depth": {"factor": 2}, "width": {"factor": 2}}
SMALL = Model(layers=2, experts=2, mtp=False, states=STATES)


@dataclass
class Grown:
    """A base, and what the view makes of it, in memory to be changed before it is written."""

    base: Path
    tensors: dict[str, torch.Tensor]
    objects: dict[str, Any]
    manifest: dict[str, Any]

    def write(self, directory: Path, grid: Any = None) -> Path:
        bases.save(directory / "iter_0000007", {**self.tensors, **self.objects}, grid)
        (directory / TRACKER).write_text("7")
        manifest.write(directory, self.manifest)
        return directory / "iter_0000007"

    def verified(self, directory: Path) -> Verification:
        return verify(self.base, self.write(directory))


def grown(directory: Path, model: Model, growth: dict[str, Any], **more: Any) -> Grown:
    state = {**bases.tensors(model), **bases.objects(model)}
    base = bases.save(directory / "base" / "iter_0000007", state, bases.megatron())
    (directory / "base" / TRACKER).write_text("7")
    config = GrowthConfig.model_validate(growth)
    reader = GrowthStorageReader(base, config)
    if more:
        made = build_plan(config, reader.source.architecture, masters=reader.source.masters, **more)
        reader = GrowthStorageReader(base, made)
    tensors, objects = load_all(reader)
    written = manifest.describe(reader.source, directory / "base", config, reader.plan)
    return Grown(base, tensors, objects, written)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return grown(tmp_path_factory.mktemp("small"), SMALL, BOTH)


@pytest.fixture
def mutable(small: Grown) -> Grown:
    """A copy of `small` for one test to change."""
    tensors = {key: tensor.clone() for key, tensor in small.tensors.items()}
    objects = {**small.objects, COMMON_STATE: [dict(small.objects[COMMON_STATE][0])]}
    objects[COMMON_STATE][0]["args"] = Namespace(**vars(small.objects[COMMON_STATE][0]["args"]))
    return Grown(small.base, tensors, objects, json.loads(json.dumps(small.manifest)))


def sites(result: Verification) -> set[tuple[str, int | None, int | None]]:
    return {(problem.key, problem.layer, problem.expert) for problem in result.problems}


# -- what is right passes

RIGHT = [
    "depth alone",
    "width alone",
    "both, with the distributed optimizer",
    "both, with the plain bf16 optimizer",
    "both in fp32, without masters",
    "three clones appended, moments copied",
    "optimizer reset: noise goes on the weights",
    "stacking with zero outputs",
    "a map, other noise scales",
    "per-layer keys, with optimizer, appended, stacked twice",
    "per-layer keys, zero outputs",
    "clones parked",
    "three clones parked, appended, moments copied, per-layer keys",
    "clones parked, optimizer reset",
    "a dense model",
]


@pytest.mark.parametrize("case", RIGHT)
def test_a_grown_checkpoint_is_verified_in_full(case, tmp_path):
    model, growth, _ = CASES[case]
    made = grown(tmp_path, model, growth)
    result = verify(made.base, made.write(tmp_path / "grown", bases.megatron()))
    assert result.problems == ()
    assert result.tensors == len(made.tensors) > 0
    assert result.elements == sum(tensor.numel() for tensor in made.tensors.values()) > 500
    assert result.nbytes == sum(tensor.nbytes for tensor in made.tensors.values())
    assert result.objects == len(made.objects) - 3 > 0  # all but the state of the run


@pytest.mark.parametrize("form", ["stacked", "per_layer"])
def test_the_key_form_may_change_with_growth(form, tmp_path):
    made = grown(tmp_path, Model(stacked=form != "stacked", states=STATES), BOTH, target_form=form)
    assert any("decoder.layers.5." in key for key in made.tensors) == (form == "per_layer")
    result = made.verified(tmp_path / "grown")
    assert result.problems == ()
    assert result.elements == sum(tensor.numel() for tensor in made.tensors.values())


@pytest.mark.parametrize(
    "case", ["both, with the distributed optimizer", "per-layer keys, zero outputs"]
)
def test_the_view_itself_is_verified(case, tmp_path):
    model, growth, _ = CASES[case]
    made = grown(tmp_path, model, growth)
    result = verify(made.base, growth=GrowthConfig.model_validate(growth))
    assert result.problems == ()
    assert result.elements == sum(tensor.numel() for tensor in made.tensors.values()) > 1000


@pytest.mark.parametrize("grid", [None, bases.every([2, 3, 5, 3])], ids=["whole", "uneven"])
def test_chunks_of_any_cut_are_verified(grid, small, tmp_path):
    result = verify(small.base, small.write(tmp_path, grid))
    assert result.problems == ()
    assert result.elements == sum(tensor.numel() for tensor in small.tensors.values())


def test_a_configuration_stands_in_for_the_manifest(small, tmp_path):
    directory = small.write(tmp_path)
    (tmp_path / manifest.MANIFEST).unlink()
    assert verify(small.base, directory, growth=GrowthConfig.model_validate(BOTH)).passed
    assert not verify(
        small.base, directory, growth=GrowthConfig.model_validate({**BOTH, "seed": 1})
    ).passed


def test_a_run_with_ranks_and_settings_of_its_own_passes(mutable, tmp_path):
    """Random states go by rank and arguments by run: neither is growth's."""
    mutable.objects["rng_state/shard_0.0_2.1"] = mutable.objects.pop("rng_state/shard_0.0_1.1")
    mutable.objects["rng_state/shard_1.0_2.1"] = ["another rank's"]
    mutable.objects[COMMON_STATE][0]["args"].save = "elsewhere"
    assert mutable.verified(tmp_path).problems == ()


def test_objects_with_the_same_content_need_not_have_the_same_bytes(mutable, tmp_path):
    key = next(key for key in mutable.objects if "linear_qkv._extra_state" in key)
    mutable.objects[key] = dict(mutable.objects[key])
    mutable.objects[key]["of"] = "".join(mutable.objects[key]["of"])
    assert mutable.verified(tmp_path).problems == ()


# -- what is wrong is named


def test_one_flipped_bit_is_found(mutable, tmp_path):
    key = "decoder.layers.self_attention.linear_qkv.weight"
    mutable.tensors[key].view(torch.int16)[3, 5, 1] ^= 1
    result = mutable.verified(tmp_path)
    found = [problem for problem in result.problems if "master" not in problem.what]
    assert [(p.key, p.layer, p.expert, p.elements) for p in found] == [(key, 3, None, 1)]
    assert found[0].difference is not None
    assert 0 < found[0].difference < 0.1
    assert sites(result) == {(key, 3, None)}  # the master tells on the weight as well


def test_one_flipped_bit_of_a_noisy_master_is_found(mutable, tmp_path):
    key = f"optimizer.state.param.decoder.layers.{FC1}"
    mutable.tensors[key].view(torch.int32)[2, 1, 0, 0] ^= 1
    problem, *rest = mutable.verified(tmp_path).problems
    assert (problem.key, problem.layer, problem.expert, problem.elements) == (key, 2, 1, 1)
    assert rest == []  # the cast does not show it: only the exact stream does


def test_the_sign_of_a_zero_is_a_bit(tmp_path):
    made = grown(tmp_path, SMALL, {"depth": {"new_layer_init": "zero_output"}})
    key = "decoder.layers.self_attention.linear_proj.weight"
    made.tensors[key][1, 0, 0] = -0.0
    result = made.verified(tmp_path / "grown")
    assert (key, 1, None) in sites(result)
    assert any("is not zero" in problem.what for problem in result.problems)


def test_two_swapped_experts_are_found(mutable, tmp_path):
    for state in ("", *(f"optimizer.state.{state}." for state in STATES)):
        key = f"{state}decoder.layers.{FC2}"
        mutable.tensors[key][1, [0, 2]] = mutable.tensors[key][1, [2, 0]]
    result = mutable.verified(tmp_path)
    assert {(layer, expert) for _, layer, expert in sites(result)} == {(1, 0), (1, 2)}
    assert len(sites(result)) == 8  # weight, master and both moments, of both


def test_two_swapped_depth_copies_differ_by_their_noise(mutable, tmp_path):
    key = f"decoder.layers.{FC1}"
    mutable.tensors[key][[0, 1]] = mutable.tensors[key][[1, 0]]
    layers = {(layer, expert) for _, layer, expert in sites(mutable.verified(tmp_path))}
    assert layers == {
        (layer, expert) for layer in (0, 1) for expert in (1, 3)
    }  # originals are alike


def test_a_dropped_object_is_found(mutable, tmp_path):
    key = "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_3.1_4.4"
    del mutable.objects[key]
    assert mutable.verified(tmp_path).problems == (Problem(key, "is missing"),)


def test_an_object_of_another_layer_is_found(mutable, tmp_path):
    key = "decoder.layers.self_attention.linear_qkv._extra_state/shard_{}_4"
    mutable.objects[key.format(0)] = mutable.objects[key.format(2)]
    assert sites(mutable.verified(tmp_path)) == {(key.format(0), None, None)}


def test_an_incomplete_grid_of_run_state_is_found(mutable, tmp_path):
    mutable.objects["rng_state/shard_0.0_2.1"] = mutable.objects.pop("rng_state/shard_0.0_1.1")
    assert mutable.verified(tmp_path).problems == (Problem("rng_state", "has 1 of its 2 shards"),)


@pytest.mark.parametrize(
    "key", [f"decoder.layers.{ROUTER}", "optimizer.state.exp_avg.output_layer.weight"]
)
def test_a_dropped_tensor_is_found(key, mutable, tmp_path):
    del mutable.tensors[key]
    assert mutable.verified(tmp_path).problems == (Problem(key, "is missing"),)


def test_a_tensor_too_many_is_found(mutable, tmp_path):
    mutable.tensors["decoder.layers.mlp.router.bias"] = torch.zeros(4, 4)
    assert [p.what for p in mutable.verified(tmp_path).problems] == [
        "is no tensor of the grown model"
    ]


def test_another_shape_and_another_type_are_found(mutable, tmp_path):
    norm, head = "decoder.final_layernorm.weight", "output_layer.weight"
    mutable.tensors[norm] = mutable.tensors[norm][:3].clone()
    mutable.tensors[head] = mutable.tensors[head].float()
    assert {(p.key, p.what) for p in mutable.verified(tmp_path).problems} == {
        (norm, "has shape [3], not [4]"),
        (head, "is of type torch.float32, not torch.bfloat16"),
    }


def test_a_moment_that_was_not_rescaled_is_found(mutable, tmp_path):
    key = f"optimizer.state.exp_avg_sq.decoder.layers.{FC1}"
    mutable.tensors[key][2, 3] *= 4
    (problem,) = mutable.verified(tmp_path).problems
    assert (problem.key, problem.layer, problem.expert) == (key, 2, 3)
    assert problem.elements == SMALL.ffn * 2 * SMALL.hidden
    assert problem.what == "is not the base's layer 1 expert 1 / 4"


def test_a_moment_that_was_rescaled_though_it_has_no_experts_is_found(mutable, tmp_path):
    key = "optimizer.state.exp_avg.decoder.layers.self_attention.linear_proj.weight"
    mutable.tensors[key][1] /= 2
    assert sites(mutable.verified(tmp_path)) == {(key, 1, None)}


def test_a_router_row_of_the_wrong_expert_is_found(mutable, tmp_path):
    for key in (f"decoder.layers.{ROUTER}", f"optimizer.state.param.decoder.layers.{ROUTER}"):
        mutable.tensors[key][1, 2] = mutable.tensors[key][1, 0]
    assert sites(mutable.verified(tmp_path)) == {
        (f"decoder.layers.{ROUTER}", 1, 2),
        (f"optimizer.state.param.decoder.layers.{ROUTER}", 1, 2),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 2),
        ("num_experts", 2),
        ("moe_router_topk", 2),
        ("hidden_size", 8),
        ("moe_layer_freq", [1, 0, 1, 1]),
    ],
)
def test_a_wrong_argument_in_the_common_state_is_found(name, value, mutable, tmp_path):
    setattr(mutable.objects[COMMON_STATE][0]["args"], name, value)
    (problem,) = mutable.verified(tmp_path).problems
    assert problem.key == COMMON_STATE
    assert f"args.{name} " in problem.what


def test_a_per_layer_list_that_was_not_spread_is_found(tmp_path):
    made = grown(tmp_path, Model(stacked=False, dense=(0,)), BOTH)
    made.objects[COMMON_STATE][0]["args"].moe_layer_freq = [0, 1, 1, 0, 1, 1]
    (problem,) = made.verified(tmp_path / "grown").problems
    assert (
        "args.moe_layer_freq says [0, 1, 1, 0, 1, 1] of the layers, not [0, 0, 1, 1, 1, 1]"
        in problem.what
    )


def test_optimizer_state_that_should_have_been_reset_is_found(tmp_path):
    made = grown(tmp_path, Model(states=STATES), {**BOTH, "optimizer": "reset"})
    made.tensors["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(6, 4)
    made.objects[COMMON_STATE][0]["optimizer"] = {"param_groups": [{"step": 7}]}
    assert {key for key, _, _ in sites(made.verified(tmp_path / "grown"))} == {
        "optimizer.state.exp_avg.output_layer.weight",
        COMMON_STATE,
    }


def test_noise_from_another_seed_is_found(tmp_path):
    made = grown(tmp_path, SMALL, BOTH)
    other = grown(tmp_path / "other", SMALL, {**BOTH, "seed": 4321})
    made.tensors = other.tensors
    result = made.verified(tmp_path / "grown")
    noisy = {f"decoder.layers.{name}" for name in (FC1, FC2, ROUTER)}
    masters = {f"optimizer.state.param.{key}" for key in noisy}
    assert {key for key, _, _ in sites(result)} == noisy | masters
    clones = {(layer, expert) for layer in range(4) for expert in (1, 3)}
    assert {(layer, expert) for _, layer, expert in sites(result)} == clones
    assert any("seed 1234" in problem.what for problem in result.problems)


def test_noise_on_expert_bias_is_found(mutable, tmp_path):
    key = "decoder.layers.mlp.router.expert_bias"
    mutable.tensors[key][0, 3] += 0.01
    (problem,) = mutable.verified(tmp_path).problems
    assert (problem.key, problem.layer, problem.expert, problem.elements) == (key, 0, 3, 1)
    assert problem.difference == pytest.approx(0.01, rel=1e-3)


def test_a_value_that_is_no_number_is_found(mutable, tmp_path):
    key = "embedding.word_embeddings.weight"
    mutable.tensors[key][0, 0] = torch.nan
    problems = mutable.verified(tmp_path).problems
    assert {problem.key for problem in problems} == {key}
    assert all(problem.difference != problem.difference for problem in problems)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("decoder.layers.mlp.router.expert_bias", "below every original of its layer"),
        (f"optimizer.state.exp_avg.decoder.layers.{FC1}", "zero, as the momentum"),
        (f"optimizer.state.exp_avg_sq.decoder.layers.{ROUTER}", "layer 0 expert 0"),
    ],
)
def test_a_parked_clone_that_is_as_its_original_or_otherwise_wrong_is_found(key, what, tmp_path):
    made = grown(tmp_path, SMALL, {"width": PARKED})
    tensor = made.tensors[key]
    wrong = tensor[0, 0] / 2 if "exp_avg_sq" in key else tensor[0, 0]
    assert not torch.equal(tensor[0, 1], wrong)
    tensor[0, 1] = wrong
    (problem,) = made.verified(tmp_path / "grown").problems
    assert (problem.key, problem.layer, problem.expert) == (key, 0, 1)
    assert what in problem.what


@pytest.mark.parametrize("how", ["one bit", "all bytes"])
@pytest.mark.parametrize(
    ("key", "landmark"),
    [
        (f"decoder.layers.{FC1}", b"archive/data/0"),
        ("output_layer._extra_state/shard_0_1", b"head"),
        (COMMON_STATE, b"num_layers"),
    ],
)
def test_damage_on_disk_is_found(key, landmark, how, small, tmp_path):
    """torch does not look at the checksums of its archives: one bit flips in silence."""
    directory = small.write(tmp_path, bases.megatron())
    stored = FileSystemReader(directory).read_metadata().storage_data
    info = next(info for index, info in stored.items() if index.fqn == key)
    content = bytearray((directory / info.relative_path).read_bytes())
    if how == "all bytes":
        content[info.offset : info.offset + info.length] = b"\0" * info.length
    else:
        at = content.index(landmark, info.offset)
        if landmark.startswith(b"archive"):
            at = (
                content.index(b"PK\x07\x08", at) - 1
            )  # its last byte: a descriptor follows the data
        content[at] ^= 1
    (directory / info.relative_path).write_bytes(content)
    result = verify(small.base, directory)
    assert {problem.key for problem in result.problems} == {key}


# -- the manifest


@pytest.mark.parametrize(
    "field", ["plan_fingerprint", "base_fingerprint", "iteration", "seed", "noise_scale"]
)
def test_a_manifest_that_contradicts_itself_or_the_base_is_found(field, mutable, tmp_path):
    mutable.manifest[field] = "other"
    (problem,) = mutable.verified(tmp_path).problems
    assert problem.key == manifest.MANIFEST
    assert f"says {field} 'other'" in problem.what


def test_a_manifest_whose_plan_is_not_its_growths_is_found(mutable, tmp_path):
    mutable.manifest["growth"]["width"]["order"] = "append"
    (problem,) = mutable.verified(tmp_path).problems
    assert "has a plan with experts" in problem.what


def test_a_base_that_was_saved_again_is_found(small, tmp_path):
    state = {**bases.tensors(SMALL, seed=1), **bases.objects(SMALL)}
    base = bases.save(tmp_path / "base" / "iter_0000007", state, bases.every([2, 2, 5, 3]))
    result = verify(base, small.write(tmp_path / "grown"))
    assert "base_fingerprint" in result.problems[0].what
    assert any(problem.elements for problem in result.problems)


# -- bad input


def test_a_grown_checkpoint_without_a_manifest_is_bad_input(small, tmp_path):
    directory = small.write(tmp_path)
    (tmp_path / manifest.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no growth_manifest"):
        verify(small.base, directory)


def test_noise_of_another_version_is_bad_input(mutable, tmp_path):
    mutable.manifest["noise_stream_version"] = 99
    with pytest.raises(CheckpointError, match="99"):
        mutable.verified(tmp_path)


def test_neither_grown_nor_configuration_is_bad_input(small):
    with pytest.raises(ConfigError, match="nothing says"):
        verify(small.base)


def test_a_base_with_a_damaged_master_is_reported(tmp_path):
    base = bases.tensors(SMALL)
    key = "optimizer.state.param.output_layer.weight"
    base[key] = base[key].roll(1)
    made = grown(tmp_path / "whole", SMALL, BOTH)
    made.base = bases.save(
        tmp_path / "iter_0000007", {**base, **bases.objects(SMALL)}, bases.megatron()
    )
    result = made.verified(tmp_path / "grown")
    assert any("in the base, is not its fp32 master" in problem.what for problem in result.problems)


# -- the route


def test_the_verifier_takes_another_route_than_growth(monkeypatch, small, tmp_path):
    """It neither imports growth's way of making values nor calls the plan's, save to show the view
    itself."""
    directory = small.write(tmp_path)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("growth's own route")

    for owner, name in (
        (GrowthPlan, "resolve"),
        (GrowthPlan, "target_tensors"),
        (GrowthPlan, "target_objects"),
        (fanout, "read_tensors"),
        (growth_values, "add_noise"),
        (growth_values, "standard_deviation"),
    ):
        monkeypatch.setattr(owner, name, forbidden)
    assert verify(small.base, directory).passed
    package = Path(values.__file__).parent
    imported = {
        node.module
        for file in package.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    growth = ("view", "units", "values", "fanout", "sigma")
    banned = {f"megatron_growth.checkpoint.{module}" for module in growth}
    assert imported
    assert not imported & banned


def _sigma_off_by_a_millionth(monkeypatch):
    right = growth_values.standard_deviation
    monkeypatch.setattr(
        growth_values, "standard_deviation", lambda chunks: right(chunks) * (1 + 1e-6)
    )


def _noise_by_source_layer(monkeypatch):
    right = GrowthPlan._transform

    def wrong(plan: GrowthPlan, key: Any, layer: Any, *more: Any) -> Any:
        made = right(plan, key, layer, *more)
        if not isinstance(made, Noise):
            return made
        return replace(made, stream=replace(made.stream, layer=plan.layers.sources[layer]))

    monkeypatch.setattr(GrowthPlan, "_transform", wrong)


def _noise_on_expert_bias(monkeypatch):
    rules = [
        replace(r, noise="router") if "expert_bias" in r.example else r for r in keys.LAYER_RULES
    ]
    monkeypatch.setattr(keys, "LAYER_RULES", tuple(rules))


def _second_moments_divided_by_m(monkeypatch):
    monkeypatch.setitem(plan.MOMENT_POWER, "exp_avg_sq", 1)


def _parked_too_near(monkeypatch):
    monkeypatch.setattr(growth_values, "PARKING_DISTANCE", 1.5)


def _parked_by_the_expert_alone(monkeypatch):
    right = growth_values._parked
    monkeypatch.setattr(growth_values, "_parked", lambda v, part, _: right(v, part, [v]))


def _momentum_of_parked_clones_kept(monkeypatch):
    monkeypatch.setattr(GrowthPlan, "_moment", lambda *_: plan.Copy())


@pytest.mark.parametrize(
    ("mistake", "shows_in"),
    [
        (_parked_too_near, "mlp.router.expert_bias"),
        (_parked_by_the_expert_alone, "mlp.router.expert_bias"),
        (_momentum_of_parked_clones_kept, f"optimizer.state.exp_avg.decoder.layers.{FC2}"),
    ],
)
def test_a_mistake_in_parking_shows_in_its_view(mistake, shows_in, monkeypatch, small):
    mistake(monkeypatch)
    problems = verify(small.base, growth=GrowthConfig.model_validate({"width": PARKED})).problems
    assert any(problem.key.endswith(shows_in) and problem.elements for problem in problems)


@pytest.mark.parametrize(
    ("mistake", "shows_in"),
    [
        (_sigma_off_by_a_millionth, FC1),
        (_noise_by_source_layer, ROUTER),
        (_noise_on_expert_bias, "mlp.router.expert_bias"),
        (_second_moments_divided_by_m, f"optimizer.state.exp_avg_sq.decoder.layers.{FC2}"),
    ],
)
def test_a_mistake_in_growth_itself_shows_in_its_view(mistake, shows_in, monkeypatch, small):
    mistake(monkeypatch)
    problems = verify(small.base, growth=GrowthConfig.model_validate(BOTH)).problems
    assert any(problem.key.endswith(shows_in) and problem.elements for problem in problems)


def test_sigma_is_the_definitions_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    for numel in (1, 2, 3, 1000):
        for scale in (1e-30, 1.0, 1e20):
            tensor = torch.randn(numel, generator=generator) * scale
            assert values.standard_deviation(tensor) == definition.sigma(tensor)


def test_each_chunk_of_the_base_is_read_at_most_a_few_times(monkeypatch, small, tmp_path):
    readers: list[RecordingReader] = []

    def recording(directory: Path) -> RecordingReader:
        readers.append(RecordingReader(directory))
        return readers[-1]

    monkeypatch.setattr("megatron_growth.checkpoint.source.FileSystemReader", recording)
    assert verify(small.base, small.write(tmp_path)).passed
    base = next(reader for reader in readers if Path(reader.path) == small.base)
    reads = [index for call in base.calls for index in call]
    assert len(reads) > 100
    assert max(reads.count(index) for index in set(reads)) <= 2


# -- the command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in argv])
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call


def test_the_command_takes_checkpoint_directories_and_exits_0(run, small, tmp_path):
    small.write(tmp_path)
    code, out, err = run("verify", small.base.parent, tmp_path)
    assert (code, err) == (0, "")
    assert "verified" in out
    assert f"{sum(tensor.numel() for tensor in small.tensors.values()):,}" in out


def test_the_command_lists_what_is_wrong_and_exits_1(run, mutable, tmp_path):
    mutable.tensors["decoder.final_layernorm.weight"][2] += 1
    mutable.write(tmp_path)
    code, out, err = run("verify", small_base := mutable.base, tmp_path, "--json")
    document = json.loads(out)
    assert (code, err, document["passed"]) == (1, "", False)
    assert {problem["key"] for problem in document["problems"]} == {
        "decoder.final_layernorm.weight"
    }
    code, out, err = run("verify", small_base, tmp_path)
    assert (code, err) == (1, "")
    assert "not verified" in out


def test_the_command_verifies_the_view(run, small, tmp_path):
    config = tmp_path / "growth.yaml"
    config.write_text("growth: {depth: {}, width: {}}\n")
    code, out, err = run("verify", small.base.parent, "--config", config)
    assert (code, err) == (0, "")
    assert "verified" in out


@pytest.mark.parametrize(
    "argv",
    [("missing",), ("missing", "--config", "missing.yaml"), ("{base}", "missing"), ("{base}",)],
)
def test_bad_input_is_one_line_and_exit_2(argv, run, small):
    code, out, err = run("verify", *(word.format(base=small.base.parent) for word in argv))
    assert (code, out) == (2, "")
    assert err.startswith("megatron-growth: error: ")
    assert err.count("\n") == 1
