"""What an experiment costs, and what is said of it."""

import json

import pytest

from megatron_growth import cli
from megatron_growth.launcher.budget import budget
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from tests.launcher.experiments import write


def of(tmp_path, *settings):
    experiment = load_experiment(write(tmp_path), settings)
    return budget(experiment, chain(experiment))


def notes(tmp_path, *settings):
    return [str(note) for stage in of(tmp_path, *settings) for note in stage.notes]


def errors(tmp_path, *settings):
    stages = of(tmp_path, *settings)
    return [str(n) for stage in stages for n in stage.notes if n.severity == "error"]


def test_flops_are_six_for_each_activated_parameter_and_token(tmp_path):
    base, deep, _ = of(tmp_path)
    assert base.flops == 6 * base.activated * base.tokens == 6 * base.activated * 10 * 16 * 128
    assert deep.sunk == base.flops
    assert deep.boundary == 6 * base.activated * 20 * base.activated


def test_the_boundary_speaks_for_interposition_or_not(tmp_path):
    assert any("stacking does as well" in note for note in notes(tmp_path))
    long = notes(tmp_path, "stages[0].budget={tokens: 1.0e+9}")
    assert any("the paper finds that interposition" in note for note in long)
    stacked = "stages[1].growth.depth.method=stacking"
    assert any(
        "use interposition" in note
        for note in notes(tmp_path, "stages[0].budget={tokens: 1.0e+9}", stacked)
    )


def test_a_stage_that_trains_on_has_no_boundary_and_its_compute_is_sunk(tmp_path):
    base, deep, anneal = of(tmp_path, "stages[2].growth=null")
    assert (anneal.parameters, anneal.boundary) == (deep.parameters, None)
    assert anneal.sunk == base.flops + deep.flops


LAYOUT = "stages[1].megatron.pipeline-model-parallel-layout"
WRONG = {
    "stages[1].layout={pipeline: 2, virtual: 3}":
        "stages[1].layout.virtual 3: does not divide: pipeline x virtual (2 x 3 = 6) must divide "
        "num_layers (8); with this pipeline, virtual can be 1, 2 or 4",
    "stages[1].layout={pipeline: 3}":
        "stages[1].layout.pipeline 3: does not divide: pipeline x virtual (3 x 1 = 3) must divide "
        "num_layers (8); take a pipeline of 1, 2, 4 or 8, or give "
        "pipeline-model-parallel-layout in megatron",
    "stages[1].layout.expert=3":
        "stages[1].layout.expert 3: does not divide: must divide num_experts (8); it can be "
        "1, 2, 4 or 8",
    "stages[1].layout.tensor=3":
        "stages[1].layout.tensor 3: does not divide: must divide num_attention_heads (4); it "
        "can be 1, 2 or 4",
    "stages[1].layout.context=4":
        "stages[1].layout: does not divide: tensor x pipeline x context (1 x 2 x 4 = 8) must "
        "divide the GPUs (2 nodes x 2 = 4); change one of them, or nodes",
    "stages[2].layout.expert=4":
        "stages[2].layout: does not divide: expert x expert_tensor x pipeline (4 x 1 x 1 = 4) must "
        "divide the GPUs (1 nodes x 2 = 2); change one of them, or nodes",
    "stages[1].global_batch_size=15":
        "stages[1].global_batch_size 15: does not divide: must be a multiple of micro_batch_size x "
        "data (1 x 2 = 2); take 14",
    f"{LAYOUT}='Et*4|t*3L'":
        f"{LAYOUT} 'Et*4|t*3L': does not divide: it has 7 layers, the model 8; write it for this "
        "model",
    f"{LAYOUT}='Et*4|t*2|t*2L'":
        f"{LAYOUT} 'Et*4|t*2|t*2L': does not divide: its 3 chunks cannot be divided by "
        "layout.pipeline (2); write it for this model",
    "cluster.memory_gb=1": "stages[0].layout: does not fit: ",
}  # fmt: skip


@pytest.mark.parametrize(("setting", "says"), WRONG.items())
def test_what_does_not_divide_or_fit_names_its_place_and_a_remedy(tmp_path, setting, says):
    assert not errors(tmp_path)
    assert any(error.startswith(says) for error in errors(tmp_path, setting))


def test_a_layout_string_says_where_layers_lie(tmp_path):
    _, even, _ = of(tmp_path)
    _, uneven, _ = of(tmp_path, f"{LAYOUT}='Et|t*7L'")
    assert uneven.memory.weights > even.memory.weights


@pytest.mark.parametrize(
    ("option", "way"),
    [
        ("use-megatron-fsdp=true", "less memory"),
        ("fp8-format=hybrid", "less memory"),
        ("cuda-graph-impl=local", "more memory"),
        ("attention-backend=unfused", "more memory"),
        ("decoder-first-pipeline-num-layers=1", "layers divided otherwise"),
    ],
)
def test_what_the_estimate_of_memory_does_not_know_is_said(tmp_path, option, way):
    name, _, value = option.partition("=")
    said = notes(tmp_path, f"stages[1].megatron.{option}")
    [note] = [note for note in said if "does not know" in note]
    shown = True if value == "true" else value
    assert note.startswith(f"stages[1].megatron.{name} {shown if value == '1' else repr(shown)}: ")
    assert way in note


def test_what_it_knows_is_not_said(tmp_path):
    known = "{bf16: true, attention-backend: flash, cuda-graph-impl: none, recompute-num-layers: 1}"
    assert not any(
        "does not know" in note for note in notes(tmp_path, f"defaults.megatron={known}")
    )


def test_precision_aware_optimizers_take_what_their_states_take(tmp_path):
    plain = of(tmp_path)[0].memory.optimizer
    aware = "stages[0].megatron.use-precision-aware-optimizer=true"
    assert of(tmp_path, aware)[0].memory.optimizer == round(plain * 10 / 12)
    moments = [f"stages[0].megatron.exp-avg{name}-dtype=bf16" for name in ("", "-sq")]
    assert of(tmp_path, aware, *moments)[0].memory.optimizer == round(plain * 6 / 12)


def test_the_optimizer_is_spread_over_data_and_context_and_divided_among_instances(tmp_path):
    four = "stages[0].nodes=2"
    plain = of(tmp_path, four)[0].memory.optimizer
    assert of(tmp_path, four, "stages[0].layout.context=2")[0].memory.optimizer == plain
    instances = "stages[0].megatron.num-distributed-optimizer-instances=2"
    assert of(tmp_path, four, instances)[0].memory.optimizer == 2 * plain


def test_modules_are_recomputed_where_granularity_is_selective(tmp_path):
    modules = "stages[0].megatron.recompute-modules=[moe_act]"
    selective = "stages[0].megatron.recompute-granularity=selective"
    plain, alone, both = (
        of(tmp_path, *settings)[0].memory.activations
        for settings in ((), (modules,), (modules, selective))
    )
    assert plain == alone > both


def test_all_to_all_is_told_before_and_after_growth(tmp_path):
    wide = "stages[2].layout.expert=2"
    base, _, grown = of(tmp_path, wide)
    assert base.all_to_all_before is None
    assert grown.all_to_all == 2 * grown.all_to_all_before == 128 * 4 * 64 * 2


def test_all_to_all_of_a_base_that_was_trained_elsewhere_is_told_too(tmp_path):
    outside = ["base={load: elsewhere, iteration: 7}", "stages[0].learning_rate=null"]
    grows = ["stages[0].growth={width: {factor: 2}}", "stages[0].layout.expert=2"]
    first = of(tmp_path, *outside, *grows)[0]
    assert first.all_to_all == 2 * first.all_to_all_before > 0


def test_a_rank_is_given_no_optimizer_states_where_they_are_reset(tmp_path):
    kept, reset = of(tmp_path)[2], of(tmp_path, "stages[2].growth.optimizer=reset")[2]
    assert reset.load == reset.memory.weights < kept.load


def test_plan_prints_an_experiment_as_a_table_and_as_json(tmp_path, capsys):
    path = str(write(tmp_path))
    for words in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["plan", path, *words])
        assert not stop.value.code
    printed = capsys.readouterr().out
    table, document = printed[: printed.index("[\n")], printed[printed.index("[\n") :]
    assert "memory of the fullest" in table
    stages = json.loads(document)
    assert [stage["name"] for stage in stages] == ["base", "deep", "wide"]
    assert stages[2]["memory"]["total"] == sum(
        stages[2]["memory"][part] for part in ("weights", "gradients", "optimizer", "activations")
    )


def test_plan_and_status_take_the_cluster_that_launch_takes(tmp_path, monkeypatch, capsys):
    path, profile = str(write(tmp_path)), tmp_path / "small.yaml"
    profile.write_text("memory_gb: 1")
    monkeypatch.chdir(tmp_path)
    for command in ("plan", "status"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, path, "--cluster", str(profile)])
        assert (stop.value.code or 0) == (1 if command == "plan" else 0)
    assert "does not fit" in capsys.readouterr().out
    (tmp_path / "growth.yaml").write_text("growth: {depth: {factor: 2}}")
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(tmp_path / "growth.yaml"), "--cluster", str(profile)])
    assert stop.value.code == 2
    assert "says nothing about growth alone" in capsys.readouterr().err


def test_plan_refuses_what_is_said_twice(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(write(tmp_path)), "--set", "stages[0].megatron.num-layers=3"])
    assert stop.value.code == 2
    assert "stages[0].megatron.num-layers 3" in capsys.readouterr().err
