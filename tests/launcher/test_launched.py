"""An experiment that is launched again: what may change, and what may not."""

import fcntl
import json

import pytest
import yaml

from megatron_growth import cli
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.render import growth_file
from tests.launcher.experiments import CONTENT, write


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    path = write(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(*settings, stage=None, words=()):
        words = [*words, *(word for setting in settings for word in ("--set", setting))]
        words += ["--stage", stage] if stage else []
        with pytest.raises(SystemExit) as stop:
            cli.main(["launch", str(path), "--target", "slurm", *words])
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


@pytest.fixture
def begun(launch, tmp_path):
    """Launched once: the first stage is done, the second has a checkpoint."""
    assert launch()[0] == 0
    stages = tmp_path / "runs/small"
    (stages / "base/DONE").touch()
    (stages / "deep/checkpoints").mkdir()
    (stages / "deep/checkpoints/latest_checkpointed_iteration.txt").write_text("12")
    return stages


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.hidden_size=128", "model.hidden_size is 128, but"),
        ("model.megatron.rotary-base=500000", "model.megatron.rotary-base is 500000, but"),
        ("data.tokenizer=HuggingFaceTokenizer", "data.tokenizer"),
        ("stages[0].budget.iterations=20", "stages[0].budget.iterations is 20, but"),
        ("stages[0].learning_rate.peak=0.5", "stages[0].learning_rate.peak is 0.5, but"),
        ("stages[0].global_batch_size=32", "stages[0].global_batch_size is 32, but"),
        ("stages[1].growth.depth.factor=3", "stages[1].growth.depth.factor is 3, but"),
        ("stages[1].growth.seed=5", "stages[1].growth.seed is 5, but"),
        ("stages[1].continue.data={offset: 3}", "stages[1].continue.data is {'offset': 3}, but"),
        ("stages[0].name=other", "the order of stages is ['other', 'deep', 'wide'], but"),
    ],
)
def test_what_made_a_checkpoint_cannot_be_said_otherwise(begun, launch, setting, says):
    record = (begun / "experiment.yaml").read_text()
    code, err = launch(setting)
    assert code == 2
    assert says in err
    assert "launch under another name" in err
    assert err.count("\n") == 1
    assert (begun / "experiment.yaml").read_text() == record


@pytest.mark.parametrize(
    "setting",
    [
        "name=other",
        "stages[0].nodes=2",
        "stages[1].layout.tensor=2",
        "stages[1].budget={iterations: 30}",
        "stages[2].growth.width.factor=4",
        "defaults.save_interval=2",
        "data.seq_length=256",
    ],
)
def test_what_lies_ahead_may_change(begun, launch, setting):
    code, err = launch(setting)
    assert code == 0, err


def test_a_length_that_counts_a_done_stage_anew_is_refused(launch, tmp_path):
    budget = "stages[0].budget={tokens: 20480}"
    assert launch(budget)[0] == 0
    (tmp_path / "runs/small/base/DONE").touch()
    code, err = launch(budget, "data.seq_length=256")
    assert code == 2
    assert "the last iteration of stages[0] is 5, but" in err


def test_a_stage_that_runs_and_has_not_saved_yet_is_held_to_its_words(launch, tmp_path):
    assert launch()[0] == 0
    with (tmp_path / "runs/small/base/.lock.0").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, err = launch("model.hidden_size=128", stage="deep")
        assert code == 2
        assert "model.hidden_size is 128, but" in err
        assert launch(stage="deep")[0] == 0
        assert "runs on this machine already" in launch()[1]
    assert launch("model.hidden_size=128")[0] == 0, "nothing has begun"


def test_the_latest_iteration_of_a_base_is_the_one_that_was_launched_from(tmp_path):
    content = {**CONTENT, "base": {"load": str(tmp_path / "base")}, "stages": CONTENT["stages"][1:]}
    path = write(tmp_path, content)
    tracker = tmp_path / "base/latest_checkpointed_iteration.txt"
    tracker.parent.mkdir()
    tracker.write_text("7")
    (link, *_) = chain(load_experiment(path))
    assert link.parent.iteration == 7
    assert yaml.safe_load(growth_file(link))["base"]["iteration"] == 7


def test_a_dry_run_says_what_the_launch_would_refuse(begun, launch):
    assert launch("model.hidden_size=128", words=["--dry-run"])[0] == 2


def test_what_an_earlier_launch_said_is_kept(begun, launch):
    before = (begun / "experiment.yaml").read_text()
    assert launch("stages[2].budget.iterations=7")[0] == 0
    assert launch("stages[2].budget.iterations=8")[0] == 0
    assert launch("stages[2].budget.iterations=8")[0] == 0
    kept = sorted(path.name for path in begun.glob("experiment*.yaml"))
    assert kept == ["experiment-1.yaml", "experiment-2.yaml", "experiment.yaml"]
    assert (begun / "experiment-1.yaml").read_text() == before


def test_logs_have_a_directory_before_a_job_opens_them(begun):
    assert (begun / "deep/slurm").is_dir()
    assert (begun / "deep/ranks").is_dir()
    assert json.loads((begun / "deep/env.json").read_text())["environment"]


def test_a_record_of_another_version_is_for_the_user_to_compare(begun, launch):
    record = begun / "experiment.yaml"
    record.write_text(record.read_text().replace("hidden_size:", "hidden_width:"))
    code, err = launch()
    assert code == 2
    assert "compare them yourself, and move it away to go on" in err
    record.unlink()
    assert launch()[0] == 0
