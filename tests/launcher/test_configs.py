"""Every experiment of ours loads, is planned, rendered for its cluster, and taken by Megatron."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

from megatron_growth.geometry import Geometry
from megatron_growth.launcher.budget import budget
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.cluster import Cluster
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.flags import check_flags
from megatron_growth.launcher.render import Target, stage_files
from megatron_growth.planning.cost import count_parameters
from megatron_growth.planning.inventory import architecture, tensors

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.yaml"))
# Billions of parameters of each stage, total and activated.
SIZES = {
    "deepseek_v3_style": [(15.8, 3.2), (31.1, 5.9), (59.9, 9.5)],
    "mixtral_8x7b_width": [(91.8, 24.2)],
    "olmoe_7b_depth": [(13.6, 2.4)],
    "paper_17b_35b_70b": [(17.9, 2.0), (35.3, 3.6), (69.1, 5.7)],
    "paper_3b_depth": [(3.4, 0.6), (6.5, 0.8), (6.5, 0.8)],
    "paper_3b_width": [(3.4, 0.6), (6.4, 0.7)],
    "quickstart": [(0.0, 0.0), (0.0, 0.0)],
    "qwen3_30b_a3b_width": [(59.5, 5.2)],
}
PUBLISHED = {"mixtral_8x7b": 46.7, "olmoe_7b": 6.92, "qwen3_30b_a3b": 30.5, "paper_17b": 18.0}


def test_all_are_listed_here():
    assert [path.stem for path in EXPERIMENTS] == sorted(SIZES)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_it_loads_plans_renders_and_megatron_takes_it(path):
    experiment = load_experiment(path)
    links = chain(experiment)
    counts = [link.parameters for link in links]
    sizes = [(round(c.total / 1e9, 1), round(c.activated.parameters / 1e9, 1)) for c in counts]
    assert sizes == SIZES[path.stem]
    for link in links:
        assert stage_files(experiment, link, Target.SLURM, Path("/lustre/work"))
    notes = [note for stage in budget(experiment, links) for note in stage.notes]
    assert not [str(note) for note in notes if note.severity == "error"]
    checked = check_flags(experiment, links)
    for link, args in zip(links, checked, strict=True):
        model = link.model
        assert args.num_layers == model.num_layers
        assert args.num_experts == model.num_experts
        assert args.moe_router_topk == model.moe_router_topk
        assert args.hidden_size == model.hidden_size


def test_what_they_render_passes_shellcheck(tmp_path):
    scripts = []
    for path, target in product(EXPERIMENTS, Target):
        profile = CONFIGS / "clusters" / "h100_kubernetes.yaml" if target is Target.K8S else None
        experiment = load_experiment(path, cluster=profile)
        for link in chain(experiment):
            for file in stage_files(experiment, link, target, Path("/lustre", target, path.stem)):
                if file.path.suffix == ".sh":
                    script = tmp_path / file.path.relative_to("/lustre")
                    script.parent.mkdir(parents=True, exist_ok=True)
                    script.write_text(file.text)
                    scripts.append(script)
    assert len(scripts) > 60
    checker = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([checker, *scripts], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[:3000]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_size(name):
    content = yaml.safe_load((CONFIGS / "models" / f"{name}.yaml").read_text())
    model = Geometry.model_validate(content)
    total = count_parameters(tensors(model), architecture(model)).total
    assert total / 1e9 == pytest.approx(PUBLISHED[name], rel=1e-2)


def test_every_cluster_profile_loads():
    profiles = sorted((CONFIGS / "clusters").glob("*.yaml"))
    assert len(profiles) >= 3
    for path in profiles:
        Cluster.model_validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("profile", "target"), [("h100_kubernetes", Target.K8S), ("local_cpu", Target.TORCHRUN)]
)
def test_an_experiment_moves_to_another_cluster(profile, target):
    path = CONFIGS / "experiments" / "paper_17b_35b_70b.yaml"
    experiment = load_experiment(path, cluster=CONFIGS / "clusters" / f"{profile}.yaml")
    for link in chain(experiment):
        assert stage_files(experiment, link, target, Path("/lustre/work"))
