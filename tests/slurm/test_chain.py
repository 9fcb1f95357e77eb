"""The quickstart chain through a real SLURM, with what happens to jobs on real clusters."""

import re
import shlex

import pytest

from tests.slurm.minislurm import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


ANNEAL = {
    "name": "annealed", "layout": {"expert": 2}, "budget": {"iterations": 5},
    "continue": {"learning_rate": {"peak": 1e-3, "decay_style": "linear"}},
}  # fmt: skip


def test_a_chain_survives_a_node_failure_and_a_preemption_and_grows_once(slurm, chain):
    settings = {"stages[0].budget": {"iterations": 40}, "stages[1].budget": {"iterations": 30}}
    run = chain(ANNEAL, **settings)
    run.launch()
    base, grown = run.job("base"), run.job("grown")
    assert slurm.state(grown) == "PENDING"

    # A node goes down in the middle of the base, and comes back by itself (ReturnToService).
    wait_for(lambda: run.saved("base") >= 10, 120)
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    wait_for(lambda: slurm.state(base) == "PENDING", 60)
    wait_for(lambda: slurm.state(base) == "COMPLETED", 120)
    first, second = run.steps("base", 0), run.steps("base", 1)
    assert first[-1] + 1 - second[0] in range(10), "it costs no more than came after the last save"
    assert second == list(range(second[0], 41))

    # Something urgent takes the nodes in the middle of the grown stage.
    wait_for(lambda: run.saved("grown") >= 50, 120)
    words = "--partition=urgent --nodes=2 --exclusive --time=1 --output=/dev/null --wrap"
    slurm.run("sbatch", *shlex.split(words), "sleep 1")
    wait_for(lambda: slurm.state(grown) == "PENDING", 90)
    stopped_at = run.saved("grown")
    wait_for(lambda: slurm.state(grown) == "COMPLETED", 150)
    assert run.events("grown") == ["started", "stopping", "requeued", "started", "finished"]
    first, second = run.said("grown", 0), run.said("grown", 1)
    assert "layers 4 -> 8, experts 8 -> 16" in first
    assert "resuming it as it is, nothing is grown" in second
    assert "growing" not in second
    assert run.steps("grown", 0)[-1] == stopped_at, "saved before the kill: no step is lost"
    assert run.steps("grown", 1) == list(range(stopped_at + 1, 71))
    assert (run.directory / "grown" / "DONE").exists()

    # A stage without growth trains the grown one on, at another layout and a falling rate.
    wait_for(lambda: slurm.state(run.job("annealed")) == "COMPLETED", 120)
    assert run.events("annealed") == ["started", "finished"]
    assert run.steps("annealed", 0) == list(range(71, 76))
    rates = re.findall(r"learning rate: (\S+)", run.said("annealed", 0))
    assert [float(rate) for rate in rates] == pytest.approx([8e-4, 6e-4, 4e-4, 2e-4, 0], abs=1e-9)
    states = run.states()
    assert {name: state["state"] for name, state in states.items()} == dict.fromkeys(states, "done")


def test_a_failed_stage_cancels_those_behind_it_and_alerts(slurm, chain, tmp_path):
    run = chain(**{
        "data.train": [str(tmp_path / "nothing-here")],
        "cluster.preflight": False,
        "cluster.slurm.alert": f'echo "$EXPERIMENT $STAGE $JOB" >>{tmp_path}/alerts',
    })  # fmt: skip
    run.launch()
    job = run.job("base")
    wait_for(lambda: slurm.state(job) == "FAILED", 90)
    assert run.events("base") == ["started", "failed"]
    wait_for(lambda: slurm.state(run.job("grown")) == "CANCELLED", 30)
    alerts = tmp_path / "alerts"
    wait_for(alerts.exists, 30)
    wait_for(lambda: slurm.state(run.job("grown", "alert")) == "COMPLETED", 30)
    assert alerts.read_text() == f"quickstart base {job}\n"
    states = run.states()
    assert states["base"]["state"] == "failed"
    assert "nothing-here" in states["base"]["why"]
    assert (states["grown"]["state"], states["grown"]["saved"]) == ("waiting", None)


@pytest.mark.usefixtures("timed")
def test_at_the_walltime_it_saves_and_is_queued_again_and_a_dead_rank_fails_it(slurm, chain):
    """With torchrun's agents this time. The walltime comes near once the run trains: a short one
    from the start would have to leave room for the slowest machine's start."""
    run = chain(**{
        "cluster.slurm": {"tasks": "torchrun", "minutes": 20, "gpus": False},
        "cluster.save_seconds": 50,  # the signal comes this and a minute before the walltime
        "cluster.preflight": False,
        "defaults.save_interval": 100000,
        "stages[0].budget": {"iterations": 100000},
    })  # fmt: skip
    run.launch()
    job = run.job("base")
    wait_for(lambda: run.steps("base", 0) != [], 120)
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=2")
    wait_for(lambda: "requeued" in run.events("base"), 120)
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=20")
    assert run.events("base") == ["started", "stopping", "requeued"]
    saved = run.saved("base")
    assert saved > 0, "saved, though no interval had passed"
    assert run.steps("base", 0)[-1] == saved
    wait_for(lambda: run.steps("base", 1) != [], 120)
    assert run.steps("base", 1)[0] == saved + 1

    # One rank dies; it has saved nothing in this start.
    run.kill("base", rank=1)
    wait_for(lambda: slurm.state(job) == "FAILED", 60)
    assert run.events("base")[-2:] == ["started", "failed"]
    assert slurm.exit_code(job) in (1, 143), "the highest of the agents', one of which was ended"
    assert "exitcode: -9" in run.states()["base"]["why"]


@pytest.mark.usefixtures("timed")
def test_a_rank_that_dies_ends_its_step_and_the_job_is_queued_again_if_it_got_further(slurm, chain):
    run = chain(**{
        "cluster.preflight": False,
        "defaults.save_interval": 30,
        "stages[0].budget": {"iterations": 100000},
    })  # fmt: skip
    run.launch()
    job = run.job("base")
    wait_for(lambda: run.saved("base") >= 30, 120)
    run.kill("base", rank=1)
    wait_for(lambda: "requeued" in run.events("base"), 60)
    saved = run.saved("base")
    wait_for(lambda: run.steps("base", 1) != [], 120)
    assert run.steps("base", 1)[0] == saved + 1

    # The other one, before it has saved anything more.
    run.kill("base", rank=0)
    wait_for(lambda: slurm.state(job) == "FAILED", 60)
    assert run.events("base") == ["started", "requeued", "started", "failed"]
    assert slurm.exit_code(job) in (137, 143), "the highest of the ranks', one of which was ended"
    base = run.states()["base"]
    assert (base["state"], base["why"]) == ("failed", "n1: task 0: Killed")


def test_training_ends_by_itself_before_the_walltime_saves_and_is_queued_again(slurm, timed):
    job = timed.job("base")
    wait_for(lambda: timed.steps("base", 1) != [], 200)
    assert timed.events("base") == ["started", "requeued", "started"], "no signal was needed"
    first, saved = timed.steps("base", 0), timed.steps("base", 1)[0] - 1
    assert "exiting program after" in timed.said("base", 0)
    assert first[-1] == saved > 0, "saved, though no interval had passed, and no step is lost"

    slurm.run("scancel", job)
    wait_for(lambda: job not in slurm.run("squeue", "-h", "-o", "%A").split(), 60)
    assert slurm.state(job) == "CANCELLED"
    assert timed.events("base").count("requeued") == 1, "cancelled stays cancelled"
    base = timed.states()["base"]
    assert (base["state"], base["why"][:18]) == ("waiting", "ended from outside")
