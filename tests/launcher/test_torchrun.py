"""The quickstart on two node agents, stopped in the middle of the grown stage, and an anneal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_growth.demo import data
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.render import Target
from tests.launcher.experiments import write
from tests.launcher.rendering import lines, rendered

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "configs" / "experiments" / "quickstart.yaml"


# The third stage trains the second on, at another layout and a rate that falls to nothing.
ANNEAL = {
    "name": "annealed",
    "growth": None,
    "layout": {"expert": 2},
    "continue": {"learning_rate": {"peak": 1e-3, "decay_style": "linear"}},
    "budget": {"iterations": 5},
}


class Agents:
    """A stage's two nodes, both on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root / "runs" / "quickstart"

    def start(self, stage: str) -> list[subprocess.Popen]:
        common = {**os.environ, "MASTER_ADDR": "localhost", "PYTHONPATH": str(REPOSITORY)}
        common["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
        return [
            subprocess.Popen(
                ["bash", self.root / stage / "node.sh"],
                env=common | {"NODE_RANK": str(node)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for node in range(2)
        ]

    def run(self, stage: str) -> list[int]:
        return [process.wait(timeout=180) for process in self.start(stage)]

    def iterations(self, stage: str) -> list[int]:
        """All that the stage ever trained, by the last rank's log."""
        text = (self.root / stage / "ranks" / "node1.train.log").read_text(errors="replace")
        return [int(number) for number in re.findall(r"\] iteration +(\d+)/", text)]

    def events(self, stage: str) -> list[str]:
        return [json.loads(line)["event"] for line in lines(self.root / stage / "events.jsonl")]

    def saved(self, stage: str) -> int:
        tracker = self.root / stage / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text() or 0) if tracker.exists() else 0


def test_two_agents_train_grow_are_stopped_and_go_on_where_they_were(tmp_path):
    data.prepare(tmp_path / "data", heldout_tokens=1025)
    settings = {
        "data.train": [str(tmp_path / "data/train")], "cluster.python": sys.executable,
        "cluster.processes_per_node": 1, "defaults.nodes": 2, "defaults.save_interval": 5,
        "defaults.megatron.log-interval": 1, "stages[0].budget": {"iterations": 10},
        "stages[0].learning_rate.warmup_iters": 2,
        "stages[1].budget": {"iterations": 40},
    }  # fmt: skip
    words = [f"{path}={json.dumps(value)}" for path, value in settings.items()]
    experiment = load_experiment(QUICKSTART, words).model_dump(mode="json", by_alias=True)
    experiment["stages"].append({**experiment["stages"][1], **ANNEAL})
    rendered(tmp_path, Target.TORCHRUN, experiment=write(tmp_path, experiment))
    agents = Agents(tmp_path)

    assert agents.run("grown") == [2, 2], "its base is not done"
    assert agents.run("base") == [0, 0]
    assert agents.iterations("base") == list(range(1, 11))

    both = agents.start("grown")
    end = time.monotonic() + 150
    while agents.saved("grown") < 15:
        assert time.monotonic() < end
        time.sleep(0.1)
    for process in both:
        process.send_signal(signal.SIGTERM)
    assert all(process.wait(timeout=60) for process in both), "stopped is not done"
    stopped_at = agents.saved("grown")
    assert agents.run("grown") == [0, 0]
    assert agents.iterations("grown") == list(range(11, 51)), "no step lost, none twice"
    assert 15 <= stopped_at < 50
    assert agents.events("grown") == [
        "refused", "refused", "started", "stopped", "started", "finished",
    ]  # fmt: skip
    assert (agents.root / "grown" / "DONE").exists()

    assert agents.run("annealed") == [0, 0]
    assert agents.iterations("annealed") == list(range(51, 56))
    text = (agents.root / "annealed/ranks/node1.train.log").read_text(errors="replace")
    rates = [float(rate) for rate in re.findall(r"learning rate: (\S+)", text)]
    assert rates == pytest.approx([8e-4, 6e-4, 4e-4, 2e-4, 0], abs=1e-9)
    before = (agents.root / "grown/ranks/node1.train.log").read_text(errors="replace")
    (first, *_), (*_, last) = (re.findall(r"lm loss: (\S+)", said) for said in (text, before))
    assert float(first) == pytest.approx(float(last), abs=0.1), "it goes on where that ended"
