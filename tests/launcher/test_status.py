"""Where stages are, read from what they leave behind."""

import fcntl
import json
import os

import pytest

from megatron_growth import cli
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.status import stage_status
from tests.launcher.experiments import write

LINE = (
    " [2026-11-25 08:18:27] iteration       {0}/      20 | consumed samples: 80 | elapsed time per "
    "iteration (ms): 500.0 | learning rate: 1.0E-03 | lm loss: 2.5E+00 | x |\n"
)


@pytest.fixture
def deep(tmp_path):
    """The second stage, from iteration 10 to 20, and a hand to write what it leaves."""
    link = chain(load_experiment(write(tmp_path)))[1]
    directory = tmp_path / link.directory
    (directory / "ranks").mkdir(parents=True)

    class Stage:
        def events(self, *names, restart=0):
            rows = (json.dumps({"event": n, "job": "41", "restart": restart}) for n in names)
            (directory / "events.jsonl").write_text("\n".join(rows) + "\n")

        def log(self, text, name="41.0.train.1.log"):
            (directory / "ranks" / name).write_text(text)

        def output(self, text):
            (directory / "slurm").mkdir(exist_ok=True)
            (directory / "slurm" / "41.out").write_text(text)

        def done(self):
            (directory / "DONE").touch()

        def status(self, job=None, queue=None, asked=True):
            return stage_status(link, job, (queue or {}) if asked else None, tmp_path)

    Stage.directory = directory
    return Stage()


def test_a_stage_that_never_started_waits(deep):
    assert (deep.status().state, deep.status().why) == ("waiting", "not started")
    waiting = deep.status("41", {"41": "PENDING (Dependency)"})
    assert (waiting.state, waiting.why) == ("waiting", "job 41 is pending (Dependency)")


def test_a_running_stage_tells_its_pace_and_the_time_left(deep):
    deep.events("started")
    deep.log(LINE.format(11) + LINE.format(12))
    status = deep.status("41", {"41": "RUNNING"})
    assert status.state == "running"
    assert (status.progress.iteration, status.progress.loss) == (12, 2.5)
    assert status.progress.tokens_per_second == 16 * 128 / 0.5
    assert status.progress.seconds_left == 8 * 0.5


def test_a_requeued_stage_waits(deep):
    deep.events("started", "stopping", "requeued")
    assert deep.status("41", {"41": "PENDING"}).state == "waiting"


def test_a_failed_stage_says_why_in_the_words_of_a_rank(deep):
    deep.events("started", "failed")
    deep.log("noise\n[rank3]: RuntimeError: shape mismatch\nmore\n")
    deep.log("nothing to say\n", "41.0.train.0.log")
    status = deep.status("41")
    assert (status.state, status.why) == ("failed", "RuntimeError: shape mismatch")
    deep.log("megatron_growth: error (rank 1): --load and --save are the same\n")
    assert deep.status("41").why == "--load and --save are the same"


LOST = "[rank1]: RuntimeError: Read error [127.0.0.1]:39: Connection reset by peer. GLHF!\n"
CANCELLED = "slurmstepd: error: *** STEP 41.1 ON n1 CANCELLED AT 2026-11-25T11:24:51 ***\n"
KILLED = "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1\n"
OOM = (
    "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=41.1. Some processes were killed.\n"
)


@pytest.mark.parametrize(
    ("culprit", "victim", "output", "why"),
    [
        ("[rank0]: ValueError: a bad batch\n", LOST + CANCELLED, "", "ValueError: a bad batch"),
        ("iteration\n", LOST + CANCELLED, KILLED, "n2: task 1: Killed"),
        ("iteration\n", LOST, "=== start 0 on n\nsrun: error: n9: task 9: Killed\n"
         "=== start 1 on n\n" + KILLED, "n2: task 1: Killed"),
        ("iteration\n" + OOM, LOST, "srun: error: n1: task 0: Exited with exit code 1\n",
         OOM.strip().removeprefix("slurmstepd: error: ")),
        ("E1 x.py] failed (exitcode: -9) local_rank: 0 (pid: 7) of binary: python\n"
         "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n", LOST,
         "srun: error: n2: task 1: Exited with exit code 1\n",
         "failed (exitcode: -9) local_rank: 0 (pid: 7) of binary: python"),
        ("", LOST, "", LOST.strip().removeprefix("[rank1]: ")),
        ("", "", "megatron-growth: KEY is not set; export it\n", "KEY is not set; export it"),
        ("", "", "", "nothing in deep/ranks or deep/slurm says why"),
    ],
)  # fmt: skip
def test_the_rank_that_failed_is_heard_before_those_it_took_along(
    deep, culprit, victim, output, why
):
    deep.events("started", "requeued", "started", "failed", restart=1)
    deep.log("[rank0]: KeyError: 'of an earlier start'\n", "41.0.train.0.log")
    deep.log("preflight is well: 2 ranks, 2 hosts\n", "41.1.preflight.0.log")
    deep.log(culprit, "41.1.train.1.log")
    deep.log(victim, "41.1.train.0.log")
    deep.output(output)
    assert deep.status("41").why == why


@pytest.mark.parametrize(
    ("event", "why"),
    [
        ("failed", "ValueError: now"),
        ("preflight-failed", "'/full' has 0 bytes left"),
        ("refused", "KEY is not set; export it first"),
    ],
)
def test_on_this_machine_only_what_the_last_start_said_counts(deep, event, why):
    deep.events("started", "failed", "started", event)
    path = deep.directory / "events.jsonl"
    path.write_text(path.read_text().replace('"41"', '"local"'))
    deep.log("=== start 1\nKeyError: 'before'\n=== start 2\nValueError: now\n", "node0.train.log")
    deep.log("=== start 1\npreflight: '/full' has 0 bytes left\n", "node0.preflight.log")
    deep.log("megatron-growth: KEY is not set; export it first\n", "node0.refused.log")
    assert deep.status().why == why


def test_where_no_log_says_why_the_exit_code_does(deep):
    deep.events("started")
    last = {"event": "failed", "job": "41", "restart": 0, "code": 137}
    with (deep.directory / "events.jsonl").open("a") as file:
        file.write(json.dumps(last))
    assert deep.status("41").why.endswith(
        "says why; exit code 137 (killed: by hand, or for want of memory)"
    )


def test_where_slurm_cannot_be_asked_a_stage_is_not_called_failed(deep):
    deep.events("started")
    assert deep.status("41", asked=False).state == "running"


def test_a_job_that_is_gone_without_a_word_has_failed(deep):
    deep.events("started")
    assert deep.status("41").state == "failed"
    assert "without a word" in deep.status("41").why


def test_a_stage_that_was_stopped_waits_to_be_started_again(deep):
    deep.events("started", "stopped")
    assert (deep.status().state, deep.status().why[:7]) == ("waiting", "stopped")


def test_a_done_stage_is_done(deep):
    deep.events("started", "finished")
    deep.done()
    assert deep.status("41", {"41": "COMPLETING"}).state == "done"


def test_the_command_shows_all_stages(tmp_path, monkeypatch, capsys):
    path = str(write(tmp_path))
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--json"]):
        with pytest.raises(SystemExit):
            cli.main(["status", path, *words])
    printed = capsys.readouterr().out
    assert printed.count("deep") >= 2
    assert "not started" in printed


def test_a_record_that_was_cut_short_counts_for_nothing(deep):
    deep.events("started", "failed")
    deep.log("[rank3]: RuntimeError: shape mismatch\n")
    path = deep.directory / "events.jsonl"
    path.write_text(path.read_text() + '{"time": "2026-11')
    assert deep.status("41").why == "RuntimeError: shape mismatch"


def test_what_was_killed_here_without_a_word_does_not_run(deep):
    started = {"event": "started", "job": "local", "host": os.uname().nodename, "restart": 0}
    (deep.directory / "events.jsonl").write_text(json.dumps(started))
    assert deep.status().why == "ended without a word: killed; launch it again to go on"
    with (deep.directory / ".lock.0").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert deep.status().state == "running"
    (deep.directory / "events.jsonl").write_text(json.dumps({**started, "host": "elsewhere"}))
    assert deep.status().state == "running", "as far as anybody here can tell"
