"""The job's script, with stand-ins for SLURM's commands: done, queued again, or failed."""

import json
import os
import signal
import subprocess
import time

import pytest

from megatron_growth.launcher.render import Target
from tests.launcher.rendering import lines, rendered, stub

# srun's stand-in runs $1 of what the job asked it to run, in the background of the script.
SRUN = 'echo "$*" >>"$LOG/srun"; if [[ ${!#} == preflight ]]; then eval "$PREFLIGHT"; else eval "$TRAIN"; fi'  # noqa: E501
SCONTROL = """case "$1 $2" in
  "show hostnames") echo n1; echo n2 ;;
  "show node") echo "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=n1" ;;
  "show job") echo "JobId=$4 JobState=$STATE Reason=None" ;;
  "show step") [[ -e $LOG/step || ! -e $LOG/late ]] ;;
  requeue*) echo "$*" >>"$LOG/requeue"; exit "$REQUEUE" ;;
esac"""


@pytest.fixture
def job(tmp_path):
    """Run a stage's job; its exit code, what was asked of SLURM, and the events."""
    log = tmp_path / "log"
    log.mkdir()
    for name, script in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("scancel", 'echo "$*" >>"$LOG/scancel"; eval "$CANCEL"'),
    ):
        stub(tmp_path / "bin", name, script)

    def start(
        stage="base",
        train="true",
        preflight="true",
        cancel="true",
        restart=0,
        settings=(),
        state="RUNNING",
        requeue=0,
    ):
        rendered(tmp_path, Target.SLURM, *settings)
        (tmp_path / f"runs/small/{stage}/ranks").mkdir(exist_ok=True)
        environment = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": str(log), "TRAIN": train,
            "PREFLIGHT": preflight, "CANCEL": cancel, "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": str(restart), "STATE": state,
            "REQUEUE": str(requeue),
            "CHECKPOINTS": str(tmp_path / f"runs/small/{stage}/checkpoints"),
        }  # fmt: skip
        script = tmp_path / f"runs/small/{stage}/job.sh"
        return subprocess.Popen(["bash", script], env=environment, stderr=subprocess.PIPE)

    def run(**how):
        process = start(**how)
        process.communicate(timeout=30)
        return process.returncode

    run.start, run.log = start, log
    run.done = lambda stage="base": (tmp_path / f"runs/small/{stage}/DONE").exists()
    run.events = lambda stage="base": [
        json.loads(line)["event"] for line in lines(tmp_path / f"runs/small/{stage}/events.jsonl")
    ]
    run.root = tmp_path
    return run


def saves(iteration: int, code: int = 0) -> str:
    file = '"$CHECKPOINTS/latest_checkpointed_iteration.txt"'
    return f'mkdir -p "$CHECKPOINTS"; echo {iteration} >{file}; exit {code}'


def test_the_last_iteration_makes_it_done_whatever_the_exit_code(job):
    assert job(train=saves(10, code=143)) == 0
    assert job.done()
    assert job.events() == ["started", "finished"]
    assert not lines(job.log / "requeue")


def test_a_done_stage_runs_nothing(job):
    job(train=saves(10))
    before = len(lines(job.log / "srun"))
    assert job(train="exit 9") == 0
    assert len(lines(job.log / "srun")) == before == 2


def test_progress_short_of_the_end_is_queued_again(job):
    assert job(train=saves(5, code=1)) == 0
    assert lines(job.log / "requeue") == ["requeue 41"]
    assert not job.done()
    assert job.events() == ["started", "requeued"]


@pytest.mark.parametrize("code", [7, 143])
def test_no_progress_fails_with_the_exit_code_of_the_training(job, code):
    assert job(train=f"exit {code}") == code
    assert job.events() == ["started", "failed"]
    assert not lines(job.log / "requeue")


def test_a_training_that_ends_early_without_an_error_fails_all_the_same(job):
    assert job(train="true") == 1


def test_a_restart_that_gets_no_further_fails(job):
    job(train=saves(5))
    assert job(train=saves(5, code=3), restart=1) == 3


def test_a_cancelled_job_is_not_queued_again(job):
    assert job(train=saves(5, code=1), state="COMPLETING") == 1
    assert job.events() == ["started", "ended"]
    assert not lines(job.log / "requeue")


def test_requeues_are_counted(job):
    assert job(train=saves(5, code=3), restart=2, settings=("cluster.slurm.requeues=2",)) == 3


def test_a_job_that_slurm_does_not_queue_again_fails(job):
    assert job(train=saves(5, code=3), requeue=1) == 3
    assert job.events() == ["started", "requeued", "failed"]


def test_a_stage_whose_parent_is_not_done_is_refused(job):
    assert job(stage="deep") == 2
    assert job.events("deep") == ["refused"]
    assert not lines(job.log / "srun")


def test_a_failed_preflight_trains_nothing(job):
    assert job(preflight="exit 5", train=saves(10)) == 5
    assert job.events() == ["started", "preflight-failed"]


def test_the_ranks_meet_at_the_first_nodes_address(job):
    job(train='echo "$MASTER_ADDR $MASTER_PORT" >"$LOG/meet"; ' + saves(10), restart=3)
    assert lines(job.log / "meet") == ["10.0.0.7 20044"]


def test_a_missing_secret_fails_before_anything_runs(job):
    assert job(settings=("cluster.secrets=[NOT_SET]",)) == 2
    assert job.events() == ["refused"]
    assert not lines(job.log / "srun")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_training_step_and_preemption_is_queued_again(job, number):
    wait = 'touch "$LOG/up"; while [[ ! -e $LOG/term ]]; do sleep 0.05; done; exit 15'
    process = job.start(train=wait, cancel='touch "$LOG/term"')
    while not (job.log / "up").exists():
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert lines(job.log / "scancel") == ["--signal=TERM 41.1"]
    assert lines(job.log / "requeue") == ["requeue 41"]  # though it saved nothing: preempted early
    assert job.events() == ["started", "stopping", "requeued"]


def test_a_signal_waits_for_the_step_that_is_being_made(job):
    (job.log / "late").touch()
    wait = 'touch "$LOG/up"; while [[ ! -e $LOG/term ]]; do sleep 0.05; done; exit 15'
    process = job.start(train=wait, cancel='[[ -e $LOG/step ]] && touch "$LOG/term"')
    while not (job.log / "up").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    while "stopping" not in job.events():
        time.sleep(0.05)
    assert not lines(job.log / "scancel"), "SLURM would not have heard it, and said nothing"
    (job.log / "step").touch()
    process.communicate(timeout=30)
    assert lines(job.log / "scancel") == ["--signal=TERM 41.1"]
    assert lines(job.log / "requeue") == ["requeue 41"]


def test_a_signal_during_preflight_ends_it_and_nothing_is_trained(job):
    wait = 'touch "$LOG/up"; while [[ ! -e $LOG/term ]]; do sleep 0.05; done; exit 15'
    process = job.start(preflight=wait, cancel='touch "$LOG/term"')
    while not (job.log / "up").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert lines(job.log / "scancel") == ["--signal=TERM 41.0"]
    assert len(lines(job.log / "srun")) == 1
    assert job.events() == ["started", "stopping", "requeued"]


def test_a_signal_before_the_first_step_starts_none(job):
    """While the script asks SLURM for the first node's address."""
    ask = 'touch "$LOG/asked"; while [[ ! -e $LOG/answer ]]; do sleep 0.05; done\n'
    scontrol = job.root / "bin/scontrol"
    text = scontrol.read_text().replace('"show node")', f'"show node") {ask}')
    scontrol.write_text(text)
    process = job.start()
    while not (job.log / "asked").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    (job.log / "answer").touch()
    process.communicate(timeout=30)
    assert not lines(job.log / "srun")
    assert lines(job.log / "requeue") == ["requeue 41"]
