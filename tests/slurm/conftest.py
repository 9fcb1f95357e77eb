"""One SLURM for all tests here, and an experiment small enough for its two nodes."""

import io
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import yaml

from megatron_growth import cli
from megatron_growth.demo import data
from tests.launcher.rendering import lines
from tests.slurm import minislurm
from tests.slurm.minislurm import MiniSlurm

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "configs" / "experiments" / "quickstart.yaml"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    reason = minislurm.missing()
    if reason:
        pytest.skip(reason)
    running = minislurm.start(tmp_path_factory.mktemp("slurm"))
    try:
        yield running
    finally:
        minislurm.stop(running)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    data.prepare(directory, heldout_tokens=1025)
    return directory


class Chain:
    """The quickstart, a rank on each of two nodes, below a directory of its own."""

    def __init__(
        self, slurm: MiniSlurm, workdir: Path, corpus: Path, changes: dict, more: Sequence[dict]
    ) -> None:
        self.slurm, self.workdir = slurm, workdir
        self.directory = workdir / "runs" / "quickstart"
        profile = {
            "device": "cpu", "processes_per_node": 1, "save_seconds": 20, "start_minutes": 0,
            "python": sys.executable, "environment": {"GLOO_SOCKET_IFNAME": "lo"},
            "slurm": {"minutes": 20, "gpus": False},
        }  # fmt: skip
        quickstart = yaml.safe_load(QUICKSTART.read_text())
        content = {**quickstart, "cluster": profile, "stages": [*quickstart["stages"], *more]}
        self.experiment = workdir / "quickstart.yaml"
        self.experiment.write_text(yaml.safe_dump(content, sort_keys=False))
        self.settings = {
            "data.train": [str(corpus / "train")], "defaults.nodes": 2,
            "defaults.save_interval": 10, "defaults.megatron.log-interval": 1, **changes,
        }  # fmt: skip

    def launch(self) -> None:
        """`megatron-growth launch --target slurm --submit`."""
        self._run("launch", "--target", "slurm", "--submit")

    def states(self) -> dict[str, dict]:
        """`megatron-growth status --json`, by stage."""
        stages = json.loads(self._run("status", "--json"))
        return {stage["name"]: stage for stage in stages}

    def _run(self, command: str, *words: object) -> str:
        arguments = [command, self.experiment, *words]
        for path, value in self.settings.items():
            arguments += ["--set", f"{path}={json.dumps(value)}"]
        # In this process: Megatron, which the flag check imports, takes its seconds once.
        said = io.StringIO()
        environment = self.slurm.environment | {"PYTHONPATH": str(REPOSITORY)}
        with (
            mock.patch.dict(os.environ, environment),
            chdir(self.workdir),
            redirect_stdout(said),
            pytest.raises(SystemExit) as stop,
        ):
            cli.main([str(word) for word in arguments])
        assert not stop.value.code
        return said.getvalue()

    def job(self, stage: str, kind: str = "job") -> str:
        return json.loads((self.directory / "jobs.json").read_text())[stage][kind]

    def events(self, stage: str) -> list[str]:
        return [
            json.loads(line)["event"] for line in lines(self.directory / stage / "events.jsonl")
        ]

    def saved(self, stage: str) -> int:
        tracker = self.directory / stage / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text() or 0) if tracker.exists() else 0

    def said(self, stage: str, restart: int, kind: str = "train") -> str:
        """All that the ranks of a start printed."""
        logs = sorted((self.directory / stage / "ranks").glob(f"*.{restart}.{kind}.*.log"))
        return "".join(log.read_text(errors="replace") for log in logs)

    def steps(self, stage: str, restart: int) -> list[int]:
        """The iterations that a start trained."""
        text = self.said(stage, restart)
        return [int(number) for number in re.findall(r"\] iteration +(\d+)/", text)]

    def kill(self, stage: str, rank: int) -> None:
        """End one training process of a stage, without a word."""
        of_it = {f"SLURM_JOB_ID={self.job(stage)}", f"RANK={rank}"}
        conf = self.slurm.root / "etc/slurm.conf"
        found = [pid for pid in minislurm.belonging(conf) if of_it <= minislurm.environment(pid)]
        os.kill(min(found), signal.SIGKILL)


@pytest.fixture
def chain(slurm: MiniSlurm, corpus: Path, tmp_path: Path):
    def make(*more: dict, **changes: object) -> Chain:
        return Chain(slurm, tmp_path, corpus, changes, more)

    return make


@pytest.fixture(scope="module")
def timed(slurm: MiniSlurm, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """One that ends by itself after a minute: 5 of walltime, less 3 to start and 1 to save. It has
    a node of its own, and runs beside what is tested meanwhile."""
    changes = {
        "cluster.slurm": {"minutes": 5, "gpus": False, "partition": "aside"},
        "cluster.start_minutes": 3, "cluster.preflight": False,
        "defaults.nodes": 1, "defaults.layout": {}, "defaults.save_interval": 100000,
        "stages[1].layout": {}, "stages[0].budget": {"iterations": 100000},
    }  # fmt: skip
    run = Chain(slurm, tmp_path_factory.mktemp("timed"), corpus, changes, ())
    run.launch()
    return run
