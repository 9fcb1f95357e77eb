"""What a container would not have is refused before anything is launched."""

from pathlib import Path

import pytest

from megatron_growth import cli
from megatron_growth.errors import ConfigError
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.render import Target, stage_files
from tests.launcher.experiments import write
from tests.launcher.rendering import rendered

WORKDIR = Path("/lustre/work")
TRAIN = "data={seq_length: 128, tokenizer: NullTokenizer, train: %s}"
BASE = ("base={load: %s, iteration: 10}", "stages[0].growth={depth: {factor: 2}}",
        "stages[0].learning_rate=null")  # fmt: skip


def launch(directory: Path, target: Target, *settings: str, workdir: Path = WORKDIR) -> int:
    """How many files it has; none is written."""
    experiment = load_experiment(write(directory), settings)
    return sum(len(stage_files(experiment, link, target, workdir)) for link in chain(experiment))


def mounts(*pairs: str) -> str:
    return f"cluster.container={{image: a, mounts: [{', '.join(map(repr, pairs))}]}}"


def claims(*paths: str) -> tuple[str, str]:
    listed = ", ".join(f"{{name: claim{i}, path: {path}}}" for i, path in enumerate(paths))
    return "cluster.container={image: a}", f"cluster.kubernetes.claims=[{listed}]"


def based(load: str) -> tuple[str, ...]:
    return (BASE[0] % load, *BASE[1:])


# Settings of an experiment, and what must hold a directory that one of them names.
DIRECTORIES = [
    pytest.param((), "cluster.KIND", "/lustre/work", "/elsewhere", id="workdir"),
    pytest.param(("runs=/scratch/runs",), "runs", "/scratch/runs", "/lustre", id="runs"),
    pytest.param(("runs=../../runs",), "runs", "/runs", "/lustre", id="runs-above"),
    pytest.param((TRAIN % "[/data/web]",), "data.train[0]", "/data", "/lustre", id="data"),
    pytest.param(
        (TRAIN % "[0.5, data/web, '0.5', ../../data/code]",),
        "data.train[3]", "/data", "/lustre", id="data-above",
    ),
    pytest.param(
        (TRAIN % "[data/web]", "data.valid=[/data/valid]"),
        "data.valid[0]", "/data", "/lustre", id="held-out",
    ),
    pytest.param(based("/models/17b"), "base.load", "/models/17b", "/lustre", id="base"),
    pytest.param(based("../../models"), "base.load", "/models", "/lustre", id="base-above"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "where", "directory", "given"), DIRECTORIES)
def test_a_directory_that_nothing_covers_is_refused(tmp_path, settings, where, directory, given):
    with pytest.raises(ConfigError) as refusal:
        launch(tmp_path, Target.SLURM, *settings, mounts(f"{given}:{given}"))
    said = str(refusal.value)
    assert said.startswith(where.replace("KIND", "container.mounts") + ": ")
    assert f"would not have '{directory}'" in said
    assert f"add '{directory}:{directory}' to cluster.container.mounts" in said
    assert "\n" not in said
    with pytest.raises(ConfigError) as refusal:
        launch(tmp_path, Target.K8S, *settings, *claims(given))
    said = str(refusal.value)
    assert said.startswith(where.replace("KIND", "kubernetes.claims") + ": ")
    assert f"would not have '{directory}'" in said
    assert f"at {given}; add the volume that it is on to cluster.kubernetes.claims" in said
    assert "\n" not in said


@pytest.mark.parametrize(("settings", "where", "directory", "given"), DIRECTORIES)
def test_it_is_taken_once_it_is_covered(tmp_path, settings, where, directory, given):
    pairs = [f"{path}:{path}" for path in (given, directory)]
    assert launch(tmp_path, Target.SLURM, *settings, mounts(*pairs))
    assert launch(tmp_path, Target.K8S, *settings, *claims(given, directory))


def test_without_mounts_or_claims_there_is_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster.container.mounts: .*'/lustre/work', the dir"):
        launch(tmp_path, Target.SLURM, mounts())
    with pytest.raises(ConfigError, match=r"cluster.kubernetes.claims: there are none"):
        launch(tmp_path, Target.K8S, *claims())


def test_without_a_container_and_with_torchrun_all_is_there(tmp_path):
    assert launch(tmp_path, Target.SLURM, "runs=/scratch/runs")
    assert launch(tmp_path, Target.TORCHRUN, "runs=/scratch/runs", mounts())


@pytest.mark.parametrize(
    "pairs",
    [
        ("/fs1:/lustre",),
        ("/lustre:/lustre", "/fs1:/lustre/work"),
        ("/lustre/work:/lustre/work", "/fs1:/lustre/work"),
        ("/lustre/work:/lustre/work", "/fs1:/lustre"),
    ],
)
def test_another_directory_at_the_same_path_is_refused(tmp_path, pairs):
    with pytest.raises(ConfigError, match=r"'/lustre/work'.* another directory .* is '/fs1'"):
        launch(tmp_path, Target.SLURM, mounts(*pairs))


@pytest.mark.parametrize(
    "pairs",
    [
        ("/lustre:/lustre:rw+rprivate",),
        ("/lustre/:/lustre/",),
        ("/lustre",),
        ("/a:/b,/lustre:/lustre",),
        ("/fs1:/lustre", "/lustre/work:/lustre/work"),
        ("/fs1:/lustre/work", "/lustre:/lustre"),
    ],
)
def test_a_mount_may_be_written_in_any_way_of_pyxis(tmp_path, pairs):
    assert launch(tmp_path, Target.SLURM, mounts(*pairs))


def test_a_name_that_begins_alike_is_no_directory_above(tmp_path):
    with pytest.raises(ConfigError, match="would not have '/lustre/work'"):
        launch(tmp_path, Target.SLURM, mounts("/lustre/wo:/lustre/wo"))


def test_data_and_base_may_lie_elsewhere_outside(tmp_path):
    settings = (TRAIN % "[/data/web]", *based("/models/17b"))
    pairs = ("/lustre:/lustre", "/fs1/corpora:/data", "/fs1/models:/models")
    assert launch(tmp_path, Target.SLURM, *settings, mounts(*pairs))


def test_a_tokenizer_that_is_here_is_looked_for_and_a_name_is_not(tmp_path):
    workdir, tokenizer = tmp_path / "work", tmp_path / "tokenizer"
    workdir.mkdir()
    tokenizer.mkdir()
    mount = mounts(f"{workdir}:{workdir}")
    for name in (str(tokenizer), "../tokenizer"):
        setting = f"data.tokenizer_model={name}"
        with pytest.raises(ConfigError, match=r"data.tokenizer_model: .*not have '\S+/tokenizer'"):
            launch(tmp_path, Target.SLURM, setting, mount, workdir=workdir)
    assert launch(tmp_path, Target.SLURM, "data.tokenizer_model=org/x", mount, workdir=workdir)


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_launch_refuses_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", str(path), "--target", "slurm", "--set", mounts("/lustre:/x"), *words])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.count("\n") == 1
    assert f"add '{tmp_path}:{tmp_path}' to cluster.container.mounts" in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("field", "directory", "where"),
    [
        (f"runs={WORKDIR}/runs", WORKDIR / "runs", "runs"),
        ("data={seq_length: 8, mock: true, tokenizer: NullTokenizer, cache: /cache}",
         Path("/cache"), "data.cache"),
    ],
)  # fmt: skip
def test_what_training_writes_to_is_not_read_only(tmp_path, field, directory, where):
    fine = ["/lustre:/lustre", "/cache:/cache"]
    assert launch(tmp_path, Target.SLURM, field, mounts(*fine))
    said = rf"^{where}: '{directory}' would be read-only in the container, by .*; take `ro` from it"
    with pytest.raises(ConfigError, match=said):
        launch(tmp_path, Target.SLURM, field, mounts(*fine, f"{directory}:{directory}:ro"))


def test_where_the_site_mounts_its_storage_nothing_is_checked(tmp_path):
    image = "cluster.container={image: 'registry/image:1', mounts: null}"
    job = rendered(tmp_path, Target.SLURM, image)["base/job.sh"]
    assert "--container-image" in job
    assert "--container-mounts" not in job
