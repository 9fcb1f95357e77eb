"""`megatron-growth launch`, without a cluster."""

import pytest

from megatron_growth import cli
from megatron_growth.launcher.marks import is_done
from tests.launcher.experiments import CONTENT, write


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    path = write(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["launch", str(path), *words])
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call


def test_a_dry_run_prints_every_file_and_writes_none(tmp_path, launch):
    code, out, err = launch("--target", "slurm", "--dry-run")
    assert code == 0, err
    for name in ("experiment.yaml", "base/job.sh", "deep/growth.yaml", "wide/process.sh"):
        assert f"runs/small/{name}" in out
    assert "#SBATCH --job-name=small-deep" in out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_names_files_elsewhere_by_their_whole_path(tmp_path, launch):
    code, out, err = launch("--target", "slurm", "--dry-run", "--set", "runs=/scratch/runs")
    assert code == 0, err
    assert "/scratch/runs/small/base/job.sh" in out


def test_one_stage_is_written_alone(tmp_path, launch):
    assert launch("--target", "slurm", "--stage", "deep")[0] == 0
    written = {path.name for path in (tmp_path / "runs/small").iterdir()}
    assert written == {"experiment.yaml", "deep"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--stage", "depe"), "--stage 'depe' is none of 'small'; it has base, deep, wide"),
        (("--set", "stages[1].layout.expert=3"), "stages[1].layout: does not divide: expert x"),
        (("--set", "stages[0].layout.expert_tensor=4"), "stages[0].layout: does not divide: exp"),
        (
            ("--set", "stages[1].megatron.no-such-option=1"),
            "stages[1] (deep): Megatron's parser refuses",
        ),
        (("--submit", "--dry-run"), "--dry-run starts nothing and --submit does"),
        (("--submit",), "stages[1].nodes 2: --submit with torchrun runs here alone"),
    ],
)
def test_a_mistake_is_one_line(launch, words, says):
    code, _, err = launch("--target", "torchrun", *words)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1


def test_a_cluster_without_its_command_is_said(launch, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = launch("--target", "slurm", "--submit")
    assert code == 2
    assert "'sbatch' is not on this machine" in err


def test_a_done_stage_is_known_by_its_mark(tmp_path):
    from megatron_growth.launcher.chain import chain
    from megatron_growth.launcher.experiment import load_experiment

    link = chain(load_experiment(write(tmp_path)))[0]
    assert not is_done(tmp_path / link.directory)
    (tmp_path / link.directory).mkdir(parents=True)
    (tmp_path / link.directory / "DONE").touch()
    assert is_done(tmp_path / link.directory)


@pytest.mark.parametrize("content", [{"growth": {"depth": {}}}, CONTENT["model"]])
def test_what_is_no_experiment_is_not_launched(tmp_path, capsys, content):
    path = write(tmp_path, content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", str(path), "--target", "slurm"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-growth: error: {path} is no experiment, which has `model`")


@pytest.mark.parametrize("forgotten", ["stages", "model"])
def test_an_experiment_that_forgets_a_section_is_told_which(tmp_path, capsys, forgotten):
    content = {key: value for key, value in CONTENT.items() if key != forgotten}
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(write(tmp_path, content))])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"experiment.yaml: {forgotten} is missing; give it (" in line
