"""Stages on this machine: signals, exit codes, and one run at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_growth.launcher.here import holder
from tests.launcher.experiments import write
from tests.launcher.rendering import lines, stub

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def launched(tmp_path):
    """Launch stages with a `python` that runs `$TRAIN`."""

    def start(train, preflight="true", stages=("--stage", "base")):
        python = stub(
            tmp_path,
            "python",
            f"""
checkpoints={tmp_path}/runs/small/base/checkpoints
saves() {{ mkdir -p $checkpoints; echo $1 >$checkpoints/latest_checkpointed_iteration.txt; }}
case "$*" in *preflight*) {preflight} ;; *) echo "$$" >{tmp_path}/pid; {train} ;; esac""",
        )
        words = ["launch", write(tmp_path), "--target", "torchrun", "--submit", *stages]
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "megatron_growth",
                *words,
                "--set",
                f"cluster.python={python}",
                "--set",
                "stages[1].nodes=1",
                "--set",
                "stages[1].layout={expert: 2}",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def events(root: Path) -> list[str]:
    return [json.loads(line)["event"] for line in lines(root / "runs/small/base/events.jsonl")]


# Saves when it is asked to end, as Megatron does after its current step.
SAVES = "trap 'saves 4; exit 0' TERM; for i in $(seq 200); do sleep 0.1; done"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_lets_the_run_save_and_says_how_to_go_on(launched, tmp_path, number, code):
    process = launched(SAVES)
    until(lambda: (tmp_path / "pid").exists())
    # As a terminal does: to the whole foreground group.
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert out.endswith("base: running\n")
    assert "the run saves after its current step" in err
    assert "stage 'base' was stopped; launch again to go on from what it saved" in err
    assert "Traceback" not in err
    assert events(tmp_path) == ["started", "stopped"]
    tracker = tmp_path / "runs/small/base/checkpoints/latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "4\n"


def test_what_is_stopped_in_its_preflight_is_not_called_failed(launched, tmp_path):
    process = launched("true", preflight=f"touch {tmp_path}/pid; exec sleep 60")
    until(lambda: (tmp_path / "pid").exists())
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert events(tmp_path) == ["started", "stopped"]


def test_a_stage_that_is_done_when_it_is_stopped_is_the_last_one(launched, tmp_path):
    process = launched(SAVES.replace("saves 4", "saves 10"), stages=())
    until(lambda: (tmp_path / "pid").exists())
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "base: done" in out
    assert "deep: running" not in out
    assert "stopped before stage 'deep'" in err


def test_a_stage_that_fails_ends_the_chain_with_its_exit_code(launched, tmp_path):
    process = launched("exit 7")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 7
    assert "stage 'base' ended with exit code 7" in err
    assert out.endswith("base: running\n")
    assert events(tmp_path) == ["started", "failed"]


def test_a_stage_runs_once_at_a_time(launched, tmp_path):
    process = launched(SAVES)
    directory = tmp_path / "runs/small/base"
    until(lambda: (tmp_path / "pid").exists())
    running = holder(directory)
    assert running is not None
    again = subprocess.run(
        ["bash", directory / "node.sh"], capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert f"base runs already (process {running})" in again.stderr
    assert events(tmp_path) == ["started"], "what runs is not called failed"
    os.kill(int(running), signal.SIGTERM)
    process.communicate(timeout=30)
    assert holder(directory) is None


def test_what_outlives_its_script_still_holds_the_stage(launched, tmp_path):
    process = launched("exec sleep 300")
    directory = tmp_path / "runs/small/base"
    until(lambda: (tmp_path / "pid").exists())
    script = int(holder(directory) or 0)
    os.kill(script, signal.SIGKILL)
    assert process.wait(timeout=30) == 128 + signal.SIGKILL
    assert holder(directory) is not None
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    until(lambda: holder(directory) is None)
