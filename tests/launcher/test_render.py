"""What is rendered: scripts that shellcheck likes, the very command line, a TrainJob that fits."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from megatron_growth.config import load_config
from megatron_growth.errors import ConfigError
from megatron_growth.launcher.arguments import stage_arguments
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.render import TEMPLATES, Target
from tests.launcher.rendering import rendered, stub

CONTAINER = "cluster.container={image: 'registry/image:1', mounts: ['/:/']}"
CLAIM = "cluster.kubernetes.claims=[{name: shared, path: /}]"
VARIANTS = [
    (Target.SLURM, ()),
    (Target.SLURM, ("cluster.slurm.tasks=torchrun", CONTAINER, "cluster.secrets=[WANDB_API_KEY]",
                    "cluster.slurm.alert='echo \"$STAGE\"'", "cluster.slurm.partition=batch",
                    "cluster.slurm.options=[--qos=high]", "cluster.preflight=false")),
    (Target.TORCHRUN, ()),
    (Target.TORCHRUN, ("cluster.secrets=[WANDB_API_KEY]", "cluster.device=cpu")),
    (Target.K8S, (CONTAINER, CLAIM)),
]  # fmt: skip


@pytest.mark.parametrize(("target", "settings"), VARIANTS)
def test_every_script_passes_shellcheck(tmp_path, target, settings):
    files = rendered(tmp_path, target, *settings)
    scripts = sorted(tmp_path.rglob("*.sh"))
    assert len(scripts) >= 6
    checker = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([checker, *scripts], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert all("{{" not in text and "{%" not in text for text in files.values())


def test_the_process_runs_the_very_command_line(tmp_path):
    python = stub(tmp_path, "python", 'printf "%s\\n" "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$@"')
    settings = (f"cluster.python={python}", "stages[0].megatron.moe-z-loss-coeff=null",
                "stages[0].megatron.data-args-path='a file; rm -rf $HOME'")  # fmt: skip
    rendered(tmp_path, Target.SLURM, *settings)
    environment = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "PATH": "/bin"}
    process = tmp_path / "runs/small/base/process.sh"
    said = subprocess.run(
        ["bash", process, "train"], env=environment, capture_output=True, text=True, check=True
    )
    experiment = load_experiment(tmp_path / "experiment.yaml", settings)
    words = stage_arguments(experiment, chain(experiment)[0], walltime=60)
    assert said.stdout.splitlines() == ["3", "1", "4", "-m", "megatron_growth.train", *words]
    assert "a file; rm -rf $HOME" in words


@pytest.mark.parametrize(("tasks", "per_node"), [("per_process", 2), ("torchrun", 1)])
def test_a_job_asks_for_one_task_a_gpu_or_one_agent_a_node(tmp_path, tasks, per_node):
    job = rendered(tmp_path, Target.SLURM, f"cluster.slurm.tasks={tasks}")["deep/job.sh"]
    assert "#SBATCH --nodes=2\n" in job
    assert f"#SBATCH --ntasks-per-node={per_node}\n" in job
    assert "#SBATCH --gpus-per-node=2\n" in job
    assert "#SBATCH --time=60\n#SBATCH --signal=B:USR1@360\n#SBATCH --requeue\n" in job


def test_a_step_asks_for_the_container_and_its_mounts(tmp_path):
    mounts = f"[{tmp_path}:{tmp_path}, '/home/a b:/b:ro']"
    setting = f"cluster.container={{image: a, mounts: {mounts}}}"
    job = rendered(tmp_path, Target.SLURM, setting)["base/job.sh"]
    assert "--container-image=a --no-container-mount-home" in job
    assert f"--container-mounts='{tmp_path}:{tmp_path},/home/a b:/b:ro'" in job


def test_training_ends_in_time_for_the_walltime(tmp_path):
    assert "--exit-duration-in-mins 50" in rendered(tmp_path, Target.SLURM)["base/process.sh"]
    assert "--exit-duration" not in rendered(tmp_path, Target.TORCHRUN)["base/process.sh"]
    with pytest.raises(
        ConfigError, match=r"cluster.slurm.minutes 10: starting takes 5 .* raise it"
    ):
        rendered(tmp_path, Target.SLURM, "cluster.slurm.minutes=10")


def test_a_grown_stage_comes_with_its_growth_file(tmp_path):
    setting = "stages[1].continue={learning_rate: {peak: 0.001}}"
    files = rendered(tmp_path, Target.SLURM, setting)
    config = load_config(tmp_path / "runs/small/deep/growth.yaml")
    experiment = load_experiment(tmp_path / "experiment.yaml", [setting])
    assert config.growth == experiment.stages[1].growth
    assert config.continue_ == experiment.stages[1].continue_
    assert config.base.load == Path("runs/small/base/checkpoints")
    assert "base/growth.yaml" not in files
    assert "--growth-config runs/small/deep/growth.yaml" in files["deep/process.sh"]
    assert "--num-layers" not in files["deep/process.sh"]


def test_a_stage_that_trains_on_starts_from_the_one_before_and_decays_over_its_own_length(tmp_path):
    anneal = "stages[2]={name: anneal, nodes: 1, layout: {expert: 2}, global_batch_size: 16, \
save_interval: 5, budget: {iterations: 5}, \
continue: {learning_rate: {peak: 1.0e-3, decay_style: linear}}}"
    files = rendered(tmp_path, Target.SLURM, anneal)
    config = load_config(tmp_path / "runs/small/anneal/growth.yaml")
    assert config.growth.as_is
    assert config.base.load == Path("runs/small/deep/checkpoints")
    assert config.continue_.learning_rate.decay_iters == 5
    assert "-m megatron_growth.pretrain\n" in files["anneal/process.sh"]
    assert "--train-iters 25\n" in files["anneal/process.sh"]
    assert f"parent={tmp_path}/runs/small/deep\n" in files["anneal/job.sh"]


@pytest.mark.parametrize("name", ["two words", "100%", "it's", "a#b"])
def test_a_directory_that_sbatch_would_misread_is_refused_and_others_run_in_it(tmp_path, name):
    workdir = tmp_path / name
    python = stub(workdir / "bin", "python", 'printf "%s\\n" "$PWD" "$@"')
    with pytest.raises(ConfigError, match=r"cannot say; launch from another, or set `runs`"):
        rendered(workdir, Target.SLURM)
    with pytest.raises(ConfigError, match=r"cannot say"):
        rendered(tmp_path, Target.SLURM, f"runs={json.dumps(name)}")
    words = [f"cluster.python={json.dumps(str(python))}", "stages[0].nodes=1"]
    rendered(workdir, Target.TORCHRUN, *words, f"runs={json.dumps('runs of ' + name)}")
    stage = workdir / f"runs of {name}/small/base"
    done = subprocess.run(["bash", stage / "node.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, "it ends, and nothing was trained"
    said = (stage / "ranks/node0.train.log").read_text().splitlines()
    assert said[0].startswith("=== start ")
    assert said[1] == str(workdir)
    assert said[said.index("--save") + 1] == f"runs of {name}/small/base/checkpoints"
    assert [json.loads(line)["event"] for line in (stage / "events.jsonl").open()] == [
        "started", "failed",
    ]  # fmt: skip


def test_secrets_travel_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "do-not-tell")
    named = "cluster.kubernetes.secret=keys"
    settings = ("cluster.secrets=[WANDB_API_KEY]", CONTAINER, CLAIM, named)
    for target in Target:
        for text in rendered(tmp_path, target, *settings).values():
            assert "do-not-tell" not in text


@pytest.mark.parametrize(
    ("section", "option", "says"),
    [
        ("stages[1].megatron", "train-iters=3", "(20)"),
        ("stages[1].megatron", "num_layers=3", "(4)"),
        ("stages[1].megatron", "vocab-size=3", "(256)"),
        ("stages[0].megatron", "position-embedding-type=rope", "('rope')"),
        ("stages[0].megatron", "lr=3", "(0.001)"),
        ("model.megatron", "hidden_size=3", "(64)"),
        ("model.megatron", "lr=3", "(0.001)"),
        ("model.megatron", "global-batch-size=99", "(16)"),
        ("model.megatron", "save_interval=7", "(5)"),
        ("model.megatron", "--seq-length=7", "(128)"),
        ("model.megatron", "num-query-groups=2", "(left out)"),
    ],
)
def test_an_option_that_a_field_sets_is_refused(tmp_path, section, option, says):
    name = option.partition("=")[0].removeprefix("--").replace("_", "-")
    with pytest.raises(ConfigError) as refusal:
        rendered(tmp_path, Target.SLURM, f"{section}.{option}")
    message = str(refusal.value)
    assert message.startswith(f"{section}.{name} ")
    assert (
        f"--{name} follows from what else the experiment says {says}; change that, and" in message
    )


def test_a_rate_in_continue_leaves_no_option_beside_it(tmp_path):
    rate = "stages[1].continue={learning_rate: {peak: 1.0e-3}}"
    with pytest.raises(ConfigError, match=r"stages\[1\].megatron.min-lr 1: .*\(0.0\)"):
        rendered(tmp_path, Target.SLURM, rate, "stages[1].megatron.min-lr=1")


# -- Kubernetes

# What Kubeflow Trainer's CRD (trainer.kubeflow.org/v1alpha1) says of the fields that we set.
TRAIN_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "trainer.kubeflow.org/v1alpha1"},
        "kind": {"const": "TrainJob"},
        "spec": {
            "type": "object",
            "required": ["runtimeRef"],
            "additionalProperties": False,
            "properties": {
                "runtimeRef": {"type": "object", "required": ["name"]},
                "trainer": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "image": {"type": "string"},
                        "command": {"type": "array", "items": {"type": "string"}},
                        "env": {"type": "array", "items": {"required": ["name"]}},
                        "numNodes": {"type": "integer"},
                        "numProcPerNode": {"type": "integer"},
                        "resourcesPerNode": {"type": "object"},
                    },
                },
                "runtimePatches": {"type": "array", "items": {"required": ["manager"]}},
            },
        },
    },
}


def test_a_train_job_fits_its_schema_and_is_the_golden_one(tmp_path):
    settings = (
        CONTAINER,
        "cluster.secrets=[WANDB_API_KEY]",
        "cluster.kubernetes={secret: keys, queue: h100, claims: [{name: lustre, path: "
        f"{tmp_path.parent}}}], resources: {{rdma/ib: 8}}}}",
    )
    text = rendered(tmp_path, Target.K8S, *settings)["deep/trainjob.yaml"]
    job = yaml.safe_load(text)
    jsonschema.validate(job, TRAIN_JOB)
    golden = Path(__file__).with_name("golden") / "trainjob.yaml"
    text = text.replace(str(tmp_path), "/lustre/work").replace(str(tmp_path.parent), "/lustre")
    assert text == golden.read_text(encoding="utf-8")


def test_kubernetes_needs_an_image_and_a_secret_for_secrets(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster.container: .*give one"):
        rendered(tmp_path, Target.K8S)
    with pytest.raises(ConfigError, match=r"cluster.kubernetes.secret"):
        rendered(tmp_path, Target.K8S, CONTAINER, "cluster.secrets=[A]")


# -- the templates themselves


def test_an_undefined_name_in_a_template_is_an_error(tmp_path, monkeypatch):
    import jinja2

    from megatron_growth.launcher import render

    (tmp_path / "process.sh.j2").write_text("{{ nobody_sets_this }}")
    monkeypatch.setattr(render, "TEMPLATES", tmp_path)
    with pytest.raises(jinja2.UndefinedError, match="nobody_sets_this"):
        rendered(tmp_path, Target.SLURM)


@pytest.mark.slow
def test_an_installed_package_has_the_templates(tmp_path):
    repository = Path(__file__).resolve().parents[2]
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "launch", "megatron_growth"):
        subprocess.run(["cp", "-a", repository / name, copy], check=True)
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([sys.executable, *words, copy], check=True)
    listing = [sys.executable, "-m", "zipfile", "-l", next(tmp_path.glob("*.whl"))]
    names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    templates = [path.name for path in TEMPLATES.glob("*.j2")]
    assert len(templates) >= 6
    for name in templates:
        assert f"megatron_growth/launcher/templates/{name}" in names


def test_a_job_of_kubernetes_begins_with_a_letter(tmp_path):
    claim = "cluster.kubernetes.claims=[{name: all, path: /}]"
    with pytest.raises(ConfigError, match=r"name '2fast': .* begin with a letter, and"):
        rendered(tmp_path, Target.K8S, CONTAINER, claim, "name=2fast")
    assert rendered(tmp_path, Target.TORCHRUN, "name=2fast")


def test_a_job_whose_pods_would_have_too_long_names_is_refused(tmp_path):
    long = (CONTAINER, f"name={'x' * 50}")
    with pytest.raises(ConfigError, match=r"has 55 characters, and .* leave room for 50; shorten"):
        rendered(tmp_path, Target.K8S, *long)
    assert rendered(tmp_path, Target.SLURM, *long)
