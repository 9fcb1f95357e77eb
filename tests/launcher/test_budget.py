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
    return [note for stage in of(tmp_path, *settings) for note in stage.notes]


def test_flops_are_six_for_each_activated_parameter_and_token(tmp_path):
    base, deep, _ = of(tmp_path)
    assert base.flops == 6 * base.activated * base.tokens == 6 * base.activated * 10 * 16 * 128
    assert deep.sunk == base.flops
    assert deep.boundary == 6 * base.activated * 20 * base.activated


def test_the_boundary_speaks_for_interposition_or_not(tmp_path):
    assert any("stacking does as well" in note for note in notes(tmp_path))
    long = notes(tmp_path, "stages[0].budget={tokens: 1.0e+9}")
    assert any("the paper finds for interposition" in note for note in long)
    stacked = "stages[1].growth.depth.method=stacking"
    assert any(
        "use interposition" in note
        for note in notes(tmp_path, "stages[0].budget={tokens: 1.0e+9}", stacked)
    )


def test_a_stage_that_trains_on_has_no_boundary_and_its_compute_is_sunk(tmp_path):
    base, deep, anneal = of(tmp_path, "stages[2].growth=null")
    assert (anneal.parameters, anneal.boundary) == (deep.parameters, None)
    assert anneal.sunk == base.flops + deep.flops


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages[1].layout={pipeline: 2, virtual: 3}", "pipeline x virtual (6) must divide num_layers (8)"),  # noqa: E501
        ("stages[1].layout.expert=3", "expert (3) must divide num_experts (8)"),
        ("stages[1].layout.tensor=3", "tensor (3) must divide num_attention_heads (4)"),
        ("stages[1].layout.pipeline=3", "tensor x pipeline x context (3) must divide GPUs (4)"),
        ("stages[1].global_batch_size=15", "micro_batch_size x data (2) must divide global_batch_size (15)"),  # noqa: E501
        ("cluster.memory_gb=1", "does not fit: "),
    ],
)  # fmt: skip
def test_what_does_not_divide_or_fit_is_flagged(tmp_path, setting, says):
    assert not any(note.startswith("does not") for note in notes(tmp_path))
    assert any(says in note for note in notes(tmp_path, setting))


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
        assert not stop.value.code
    assert "does not fit" in capsys.readouterr().out
    (tmp_path / "growth.yaml").write_text("growth: {depth: {factor: 2}}")
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(tmp_path / "growth.yaml"), "--cluster", str(profile)])
    assert stop.value.code == 2
    assert "says nothing about growth alone" in capsys.readouterr().err
