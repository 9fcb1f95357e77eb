"""What SLURM is asked for a chain, with stand-ins for its commands."""

import json
import os

import pytest

from megatron_growth import cli
from megatron_growth.errors import ConfigError, GrowthError
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.render import Target
from megatron_growth.launcher.submit import check_idle, check_ready, live_stages, submit
from tests.launcher.experiments import write
from tests.launcher.rendering import lines, rendered, stub

ALERT = "cluster.slurm.alert='echo failed'"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Submit the small chain; sbatch hands out 101, 102, ... and squeue tells what $QUEUE holds."""
    stub(tmp_path / "bin", "sbatch",
         'echo "$*" >>"$ASKED"; n=$(wc -l <"$ASKED"); echo $((100 + n))')  # fmt: skip
    stub(tmp_path / "bin", "squeue", 'echo "$QUEUE"; [[ -n $QUEUE || -z $DOWN ]]')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("QUEUE", "")
    monkeypatch.setenv("DOWN", "")

    def call(*settings, stage=None):
        experiment = load_experiment(write(tmp_path), settings)
        links = [link for link in chain(experiment) if stage in (None, link.stage.name)]
        live = live_stages(experiment, chain(experiment), tmp_path)
        check_idle(links, live)
        rendered(tmp_path, Target.SLURM, *settings)
        check_ready(experiment, links, live, Target.SLURM, tmp_path)
        list(submit(experiment, links, Target.SLURM, tmp_path))
        asked = [line.replace(f"{tmp_path}/runs/small/", "") for line in lines(tmp_path / "asked")]
        return asked, json.loads((tmp_path / "runs/small/jobs.json").read_text())

    return call


def test_each_stage_waits_for_the_one_before(start):
    asked, jobs = start()
    assert asked == [
        "--parsable base/job.sh",
        "--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes deep/job.sh",
        "--parsable --dependency=afterok:102 --kill-on-invalid-dep=yes wide/job.sh",
    ]
    assert jobs == {"base": {"job": "101"}, "deep": {"job": "102"}, "wide": {"job": "103"}}


def test_an_alert_waits_for_its_stage_to_fail(start):
    asked, jobs = start(ALERT)
    alert = "--parsable --dependency=afternotok:101 --kill-on-invalid-dep=yes base/alert.sh 101"
    assert asked[1] == alert
    assert jobs["base"] == {"job": "101", "alert": "102"}
    assert jobs["deep"]["job"] == "103"


def test_a_done_stage_is_passed_over_and_nothing_waits_for_it(start, tmp_path):
    (tmp_path / "runs/small/base").mkdir(parents=True)
    (tmp_path / "runs/small/base/DONE").touch()
    asked, _ = start()
    assert asked[0] == "--parsable deep/job.sh"


def test_a_stage_that_is_queued_already_is_refused(start, monkeypatch):
    start()
    monkeypatch.setenv("QUEUE", "101 RUNNING None")
    with pytest.raises(
        ConfigError,
        match=r"'base' is job 101 already .RUNNING.; .*`scancel 101`, or wait",
    ):
        start()


def test_a_refused_launch_changes_no_file_of_what_runs(start, monkeypatch, tmp_path):
    start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUEUE", "102 PENDING Dependency")
    process = tmp_path / "runs/small/deep/process.sh"
    process.write_text("as it was")
    words = ["launch", str(write(tmp_path)), "--target", "slurm", "--submit"]
    with pytest.raises(SystemExit):
        cli.main([*words, "--set", "cluster.device=cpu"])
    assert process.read_text() == "as it was"


def test_a_controller_that_does_not_answer_is_not_an_empty_queue(start, monkeypatch):
    start()
    monkeypatch.setenv("DOWN", "yes")
    with pytest.raises(GrowthError, match=r"squeue .* failed with exit code 1"):
        start()


def test_a_job_whose_alert_was_refused_is_not_forgotten(start, tmp_path):
    stub(tmp_path / "bin", "sbatch", "[[ $* == *alert.sh* ]] && exit 1; echo 101")
    with pytest.raises(GrowthError, match=r"sbatch .*alert.sh.* failed"):
        start(ALERT)
    jobs = json.loads((tmp_path / "runs/small/jobs.json").read_text())
    assert jobs == {"base": {"job": "101"}}


def test_a_single_stage_waits_for_a_parent_that_still_runs(start, monkeypatch):
    start(stage="base")
    monkeypatch.setenv("QUEUE", "101 RUNNING None")
    asked, jobs = start(stage="deep")
    assert asked[1] == "--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes deep/job.sh"
    assert jobs == {"base": {"job": "101"}, "deep": {"job": "102"}}


def test_a_stage_whose_parent_will_not_be_there_is_refused(start, tmp_path):
    with pytest.raises(ConfigError, match=r"stages\[2\].*'deep', is neither done nor queued"):
        start(stage="wide")
    (tmp_path / "runs/small/deep/DONE").touch()
    assert start(stage="wide")[0] == ["--parsable wide/job.sh"]


def test_a_secret_that_nobody_set_is_refused_before_anything_is_queued(start, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"cluster.secrets: WANDB_API_KEY not set here"):
        start("cluster.secrets=[WANDB_API_KEY]")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert len(start("cluster.secrets=[WANDB_API_KEY]")[0]) == 3


def test_a_damaged_record_of_jobs_is_said(start, tmp_path):
    start()
    (tmp_path / "runs/small/jobs.json").write_text("{")
    with pytest.raises(GrowthError, match=r"jobs.json' is damaged .* remove it"):
        start()


def test_a_job_that_is_held_lives(start, monkeypatch):
    start()
    monkeypatch.setenv("QUEUE", "101 REQUEUE_HOLD launch_failed_requeued_held")
    with pytest.raises(ConfigError, match=r"'base' is job 101 already .REQUEUE_HOLD."):
        start()
    monkeypatch.setenv("QUEUE", "101 CANCELLED None")
    assert start()[1]["base"]["job"] != "101"


def test_where_nobody_can_be_asked_what_was_handed_over_is_not_launched_again(
    start, tmp_path, monkeypatch
):
    start()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"'base' was handed over as job 101, .* no squeue here"):
        start()
    for name in ("base", "deep", "wide"):
        (tmp_path / f"runs/small/{name}/DONE").touch()
    start()


def test_with_torchrun_a_parent_in_the_queue_is_not_there(start, tmp_path):
    start(stage="base")
    experiment = load_experiment(write(tmp_path), ["stages[1].nodes=1"])
    links = chain(experiment)[1:2]
    with pytest.raises(ConfigError, match=r"'base', is neither done nor queued"):
        check_ready(experiment, links, {"base": "is job 101"}, Target.TORCHRUN, tmp_path)
