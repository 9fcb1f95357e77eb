"""Where stages are, read from what they leave behind."""

import json

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
        def events(self, *names):
            rows = (json.dumps({"event": name}) for name in names)
            (directory / "events.jsonl").write_text("\n".join(rows) + "\n")

        def log(self, text, name="41.0.train.1.log"):
            (directory / "ranks" / name).write_text(text)

        def done(self):
            (directory / "DONE").touch()

        def status(self, job=None, queue=None):
            return stage_status(link, job, queue or {}, tmp_path)

    return Stage()


def test_a_stage_that_never_started_waits(deep):
    assert (deep.status().state, deep.status().why) == ("waiting", "not started")
    waiting = deep.status("41", {"41": "PENDING"})
    assert (waiting.state, waiting.why) == ("waiting", "job 41 is pending")


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
