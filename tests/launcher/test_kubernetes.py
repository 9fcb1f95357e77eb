"""What Kubernetes is asked, with a stand-in for kubectl."""

import json
import os

import pytest

from megatron_growth.errors import ConfigError
from megatron_growth.launcher import jobs, kubernetes
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.render import Target
from megatron_growth.launcher.submit import check_idle, check_ready, live_stages, submit
from tests.launcher.experiments import write
from tests.launcher.rendering import lines, rendered, stub

SETTINGS = (
    "cluster.container={image: 'registry/image:1'}",
    "cluster.kubernetes.claims=[{name: shared, path: /}]",
)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Submit the small chain; kubectl knows one TrainJob, with the condition $CONDITION."""
    stub(
        tmp_path / "bin",
        "kubectl",
        """echo "$*" >>"$ASKED"
[[ $1 != get || -z $CONDITION ]] ||
  echo '{"metadata": {"annotations": {"megatron-growth.io/directory": "'$OF'"}},
    "status": {"conditions": [{"type": "'$CONDITION'", "status": "True"}]}}'""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("CONDITION", "")
    monkeypatch.setenv("OF", str(tmp_path / "runs/small/base"))

    def call(condition=""):
        monkeypatch.setenv("CONDITION", condition)
        experiment = load_experiment(write(tmp_path), SETTINGS)
        links = chain(experiment)
        live = live_stages(experiment, links, tmp_path)
        check_idle(links, live)
        check_ready(experiment, links, live, Target.K8S, tmp_path)
        rendered(tmp_path, Target.K8S, *SETTINGS)
        said = list(submit(experiment, links, Target.K8S, tmp_path))
        asked = [line.replace(f"{tmp_path}/runs/small/", "") for line in lines(tmp_path / "asked")]
        (tmp_path / "asked").unlink()
        return [words for words in asked if not words.startswith("get")], said

    return call


def test_the_first_stage_is_applied_and_the_rest_named(start, tmp_path):
    asked, said = start()
    assert asked == ["apply -f base/trainjob.yaml"]
    assert said == [
        "base: TrainJob small-base",
        "not started: deep, wide; submit again once base is done",
    ]
    recorded = json.loads((tmp_path / "runs/small/jobs.json").read_text())
    assert recorded == {"base": {"trainjob": "small-base", "namespace": "default"}}


@pytest.mark.parametrize("condition", ["Complete", "Failed"])
def test_a_job_that_ended_before_its_stage_was_done_is_made_anew(start, condition):
    start()
    assert start(condition)[0] == [
        "delete trainjob small-base --namespace default",
        "apply -f base/trainjob.yaml",
    ]


@pytest.mark.parametrize(
    ("condition", "state"), [("Created", "RUNNING"), ("Suspended", "PENDING (Suspended)")]
)
def test_a_job_that_is_there_still_is_refused_and_shown(start, tmp_path, condition, state):
    start()
    with pytest.raises(ConfigError, match=r"'base' is job small-base already .*delete trainjob"):
        start(condition)
    assert kubernetes.live(jobs.read(tmp_path / "runs/small")) == {"small-base": state}


def test_without_kubectl_nobody_can_be_asked(start, tmp_path, monkeypatch):
    start()
    monkeypatch.setenv("PATH", "/nowhere")
    assert kubernetes.live(jobs.read(tmp_path / "runs/small")) is None


def test_somebody_elses_job_of_that_name_is_left_alone(start, monkeypatch):
    monkeypatch.setenv("OF", "/elsewhere/runs/small/base")
    with pytest.raises(ConfigError, match=r"TrainJob 'small-base' of '/elsewhere/runs/small/base'"):
        start("Failed")
