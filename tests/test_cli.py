"""The command line, run in this process on tiny checkpoints."""

import json
import math
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_growth import cli
from megatron_growth.checkpoint import manifest, norms
from megatron_growth.checkpoint.directory import TRACKER
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.config import GrowthConfig
from megatron_growth.errors import ConfigError
from megatron_growth.planning.keys import LAYER_RULES
from megatron_growth.planning.layers import explicit, interposition, stacking
from megatron_growth.report.growth import describe_layers
from megatron_growth.report.tables import _sparkline
from tests.checkpoint import bases

MODEL = bases.Model(layers=4, experts=4, mtp=False, states=("param", "exp_avg", "exp_avg_sq"))
ADAM = ("fp32_param", "exp_avg", "exp_avg_sq")
FC1, ROUTER = f"decoder.layers.{bases.FC1}", f"decoder.layers.{bases.ROUTER}"


def written(root: Path, model: bases.Model, *, objects: bool = True, **more: torch.Tensor) -> Path:
    """A Megatron checkpoint directory with one iteration."""
    state = bases.tensors(model) | (bases.objects(model) if objects else {}) | more
    bases.save(root / "iter_0000007", state, bases.megatron())
    (root / TRACKER).write_text("7")
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("base"), MODEL)


@pytest.fixture(scope="module")
def weights_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Neither arguments nor optimizer states."""
    return written(tmp_path_factory.mktemp("weights"), bases.Model(mtp=True), objects=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command line; its exit code, stdout and stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in argv])
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call


def config(path: Path, growth: str, base: str = "") -> Path:
    file = path / "growth.yaml"
    file.write_text(f"{base}\ngrowth: {growth}\n")
    return file


# -- plan ------------------------------------------------------------------------------------------

BOTH = "{depth: {}, width: {}}"


def test_plan_prints_source_and_target_side_by_side(run, base, tmp_path):
    code, out, err = run("plan", config(tmp_path, BOTH, f"base: {{load: {base}}}"))
    assert (code, err) == (0, "")
    rows = {
        name: re.search(rf"{name} +(\d+) +(\d+)", out) for name in ("layers", "experts", "top-k")
    }
    assert {name: match and match.groups() for name, match in rows.items()} == {
        "layers": ("4", "8"), "experts": ("4", "8"), "top-k": ("2", "4")}  # fmt: skip
    assert "0-3 each x2" in out
    assert "e0 e0' e1 e1'" in out
    assert "--num-layers 8 \\\n" in out


def test_plan_json_is_one_document_that_counts_the_bases_own_tensors(run, base, tmp_path):
    code, out, _ = run("plan", config(tmp_path, BOTH), "--load", base, "--json")
    assert code == 0
    assert "\x1b" not in out
    document = json.loads(out)
    assert document["layer_map"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert document["expert_map"][1] == {"source": 0, "clone": 1}
    assert re.fullmatch("[0-9a-f]{64}", document["fingerprint"])
    assert document["noise"] == {"experts": 0.01, "router": 0.01, "stream_version": 1}
    assert document["architecture"]["num_experts"] == {"source": 4, "target": 8}
    assert sliced(document["arguments"], "--num-experts") == ["--num-experts", "8"]

    tensors = bases.tensors(MODEL)
    model = {
        k: t
        for k, t in tensors.items()
        if not k.startswith("optimizer.") and "expert_bias" not in k
    }
    assert document["parameters"]["source"]["total"] == sum(t.numel() for t in model.values())
    load_time = document["roads"][0]
    assert load_time["read"] == sum(t.nbytes for t in tensors.values())
    assert load_time["written"] == 0


def sliced(arguments: list[str], option: str) -> list[str]:
    at = arguments.index(option)
    return arguments[at : at + 2]


def test_the_options_load_wins_over_the_configurations(run, base, tmp_path):
    file = config(tmp_path, BOTH, "base: {load: /nowhere}")
    assert run("plan", file, "--load", base)[0] == 0
    assert run("plan", file)[0] == 2


@pytest.mark.parametrize(
    "growth, expected",
    [
        ("{depth: {method: stacking}}", ["stacking is"]),
        ("{depth: {skip_first: 1}}", ["first 1 and the last 0 layers stay single"]),
        ("{depth: {target_layers: 6}}", ["between 1 and 2 copies"]),
        ("{width: {top_k: keep}}", ["top_k: keep"]),
        ("{width: {noise: {experts: 0, router: 0}}}", ["no noise"]),
        ("{depth: {}, width: {}}", []),
        ("{depth: {method: map, map: [0, 1, 2, 3, 3, 3]}}", []),
    ],
)
def test_plan_warns_of_what_the_user_should_know(run, base, tmp_path, growth, expected):
    warnings = json.loads(run("plan", config(tmp_path, growth), "--load", base, "--json")[1])[
        "warnings"
    ]
    assert len(warnings) == len(expected)
    assert all(text in warning for text, warning in zip(expected, warnings, strict=True))


def test_plan_of_a_base_without_arguments_says_what_it_cannot_know(run, weights_only, tmp_path):
    code, out, _ = run("plan", config(tmp_path, BOTH), "--load", weights_only, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["arguments"] is None
    assert document["parameters"]["source"]["activated"] is None
    said = " ".join(document["warnings"])
    for text in (
        "no optimizer state",
        "no Megatron arguments",
        "top-k",
        "not grown in depth",
        "bf16 weights",
    ):
        assert text in said
    assert "unknown" in run("plan", config(tmp_path, BOTH), "--load", weights_only)[1]


@pytest.mark.parametrize("recorded", [True, False], ids=["directory recorded", "older manifest"])
@pytest.mark.parametrize("name", ["iter_0000007", "release"])
def test_a_manifest_finds_its_base_again(name, recorded, run, tmp_path):
    root = written(tmp_path / "base", MODEL)
    if name == "release":
        (root / "iter_0000007").rename(root / "release")
        (root / TRACKER).write_text("release")
    growth = GrowthConfig.model_validate({"depth": {}, "optimizer": "reset"})
    source = SourceCheckpoint(root / name, weights_only=True)
    described = manifest.describe(source, root, growth, plan_for(source, growth))
    assert described["directory"] == name
    if not recorded:
        del described["directory"]
    manifest.write(tmp_path / "run", described)
    code, out, err = run("plan", "--from-manifest", tmp_path / "run", "--json")
    if name == "release" and not recorded:
        assert (code, "iter_0000007' does not exist; iterations there: release" in err) == (2, True)
    else:
        assert (code, err) == (0, "")
        assert json.loads(out)["fingerprint"] == described["plan_fingerprint"]
        assert json.loads(out)["checkpoint"] == str(root / name)


@pytest.mark.parametrize(
    "layers, text",
    [
        (interposition(28, target=56), "0-27 each x2"),
        (interposition(28, target=52, skip_first=2, skip_last=2), "0-1, 2-25 each x2, 26-27"),
        (stacking(4, target=8), "0-3, 0-3"),
        (explicit(3, [0, 1, 1, 1, 2]), "0, 1 x3, 2"),
    ],
)
def test_layer_maps_are_written_in_runs(layers, text):
    assert describe_layers(layers) == text


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_says_what_is_in_a_checkpoint(run, base):
    code, out, err = run("inspect", base, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    tensors = bases.tensors(MODEL)
    model = {key: tensor for key, tensor in tensors.items() if not key.startswith("optimizer.")}
    assert document["iteration"] == 7
    assert document["architecture"] == {
        "num_layers": 4,
        "num_experts": 4,
        "top_k": 2,
        "key_form": "stacked",
    }
    assert document["tensors"] == {"model": len(model), "other": len(tensors) - len(model)}
    assert document["weight_bytes"] == sum(tensor.nbytes for tensor in model.values())
    assert document["objects"] == len(bases.objects(MODEL))
    assert document["optimizer_format"].startswith("fully_reshardable")
    assert document["optimizer_states"] == ["exp_avg", "exp_avg_sq", "param"]
    assert document["verdict"] == {"depth": None, "width": None}


def test_inspect_takes_the_iteration_directory_as_well(run, base):
    assert run("inspect", base / "iter_0000007")[1] == run("inspect", base)[1]


@pytest.mark.parametrize("stacked", [True, False])
def test_weight_scales_are_the_rms_of_each_layers_matrices(tmp_path, stacked):
    dense = () if stacked else (0,)
    model = bases.Model(layers=3, stacked=stacked, dense=dense, states=MODEL.states)
    source = SourceCheckpoint(written(tmp_path, model) / "iter_0000007")
    read: list[int] = []
    scales = norms.weight_scales(source, source.tensors, read.append)
    assert [scale.layer for scale in scales] == [0, 1, 2]
    assert sum(read) == norms.scale_bytes(source.tensors) > 0

    tensors = bases.tensors(model)
    compared = 0
    for scale in scales:
        values = {
            k: t.double()
            for k, t in of_layer(tensors, scale.layer, stacked).items()
            if t.dim() >= 2
        }
        assert values
        squares = sum(float(t.square().sum()) for t in values.values())
        numel = sum(t.numel() for t in values.values())
        assert scale.rms == pytest.approx(math.sqrt(squares / numel), rel=1e-12)
        for part, prefix in (("attention", "self_attention."), ("router", "mlp.router.")):
            mine = [t for key, t in values.items() if key.startswith(prefix)]
            if mine:
                whole = torch.cat([t.reshape(-1) for t in mine])
                assert scale.parts[part] == pytest.approx(
                    float(whole.square().mean().sqrt()), rel=1e-12
                )
                compared += 1
        assert ("dense" in scale.parts) == (not stacked and scale.layer == 0)
    assert compared == (6 if stacked else 5)


def of_layer(
    tensors: dict[str, torch.Tensor], layer: int, stacked: bool
) -> dict[str, torch.Tensor]:
    """Its weights by name, biases and optimizer states left out."""
    prefix = "decoder.layers." if stacked else f"decoder.layers.{layer}."
    found = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    return {
        k: t[layer] if stacked else t
        for k, t in found.items()
        if "bias" not in k and "norm" not in k
    }


def test_every_weight_that_the_grammar_knows_has_a_part():
    names = [
        r.example for r in LAYER_RULES if r.example.endswith("weight") and "norm" not in r.example
    ]
    assert len(names) > 8
    for name in names:
        assert any(name.startswith(prefix) for prefix, _ in norms._PARTS), name


def test_inspect_plots(run, base, tmp_path):
    figure = tmp_path / "scales.png"
    assert run("inspect", base, "--plot", figure)[0] == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, hint", [("scales.tree", "one of"), ("nowhere/scales.png", "first")])
def test_a_plot_that_cannot_be_written_is_refused_before_reading(run, base, tmp_path, name, hint):
    code, out, err = run("inspect", base, "--plot", tmp_path / name)
    assert (code, out) == (2, "")
    assert hint in err


def test_inspect_shows_a_checkpoint_that_cannot_be_grown_and_says_why(run, tmp_path):
    bucket = (
        "optimizer.distributed.dp_group_idx_0."
        "gbuf_idx_0.dtype_(torch.bfloat16).bucket_idx_0.exp_avg"
    )
    model = bases.Model(layers=4, experts=4)
    code, out, _ = run("inspect", written(tmp_path, model, **{bucket: torch.zeros(12)}), "--json")
    assert code == 0
    document = json.loads(out)
    assert document["optimizer_format"] == "dp_reshardable"
    assert "--dist-ckpt-optim-fully-reshardable" in document["verdict"]["depth"]
    assert document["unknown"] == 1
    assert document["architecture"]["num_layers"] == 4
    assert len(document["scales"]) == 4
    _, out, _ = run("inspect", tmp_path)
    assert out.count("cannot be grown") > 0


def test_inspect_says_that_a_dense_model_grows_in_depth_only(run, tmp_path):
    verdict = json.loads(run("inspect", written(tmp_path, bases.Model(experts=0)), "--json")[1])[
        "verdict"
    ]
    assert verdict["depth"] is None
    assert "dense" in verdict["width"]


def test_inspect_survives_values_that_are_not_finite(run, tmp_path):
    router = bases.tensors(MODEL)[ROUTER]
    router[2, 0, 0] = math.nan
    written(tmp_path, MODEL, **{ROUTER: router})
    code, out, _ = run("inspect", tmp_path)
    assert code == 0
    assert "not finite" in out
    scales = json.loads(run("inspect", tmp_path, "--json")[1])["scales"]
    assert [scale["rms"] is None for scale in scales] == [False, False, True, False]


@pytest.mark.parametrize("state, name", [("fp32_param", "mixed precision"), ("exp_avg", "fp32")])
def test_optimizer_formats_are_told_apart(run, tmp_path, state, name):
    states = ADAM[ADAM.index(state) :]
    written(tmp_path, bases.Model(states=states))
    assert json.loads(run("inspect", tmp_path, "--json")[1])["optimizer_format"].startswith(name)


def test_sparkline_rises_with_the_profile_and_marks_what_is_not_finite():
    assert _sparkline([0.0323, 0.0336, 0.0356]) == "▁▄█"
    assert _sparkline([1.0, math.nan, 2.0]) == "▁!█"
    assert _sparkline([1.0, 1.0]) == "▁▁"


# -- errors and the rest ---------------------------------------------------------------------------


def test_no_checkpoint_is_one_line_on_stderr_and_exit_2(run, tmp_path):
    code, out, err = run("inspect", tmp_path / ("long" * 60))
    assert (code, out) == (2, "")
    assert err.startswith("megatron-growth: error: checkpoint ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "text, hint",
    [
        ("{depht: {}}", "did you mean 'depth'?"),
        ("{depth: {}}", "give --load"),
    ],
)
def test_a_bad_configuration_is_an_error_with_its_remedy(run, tmp_path, text, hint):
    code, out, err = run("plan", config(tmp_path, text))
    assert (code, out) == (2, "")
    assert hint in err


def test_an_error_of_a_few_lines_is_printed_on_one(run, monkeypatch, tmp_path):
    def fail(*_: object) -> Namespace:
        raise ConfigError("one\ntwo")

    monkeypatch.setattr("megatron_growth.cli.shared.load_config", fail)
    assert run("plan", "x")[2] == "megatron-growth: error: one two\n"


def test_version_and_help(run):
    assert re.fullmatch(r"megatron-growth \d+\.\d+\.\d+\n", run("--version")[1])
    code, out, _ = run("--help")
    assert code == 0
    for command in ("plan", "grow", "inspect", "verify", "demo"):
        assert re.search(rf"\b{command}\b", out)


def test_demo_hands_its_options_on(run, monkeypatch, tmp_path):
    called: list[tuple[Path, bool]] = []
    monkeypatch.setattr("megatron_growth.demo.run", lambda out, quick: called.append((out, quick)))
    assert run("demo", "--out", tmp_path, "--quick")[0] == 0
    assert called == [(tmp_path, True)]
