"""Every command of the cluster guide runs, with stand-ins for SLURM's."""

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_growth import cli
from tests.launcher.rendering import stub

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = REPOSITORY / "docs" / "chain-on-a-cluster.md"


def commands() -> list[list[str]]:
    """The words of each, without what a pipe does with its output."""
    text = GUIDE.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^    megatron-growth (.*)$", text, re.MULTILINE)
    return [shlex.split(line.partition("|")[0]) for line in found]


def profile(workdir: Path) -> Path:
    """A copy of ours, as step 1 says, with mounts for what is launched from here."""
    copy = yaml.safe_load((REPOSITORY / "configs/clusters/h100_slurm.yaml").read_text())
    copy["container"]["mounts"] = [f"{workdir}:{workdir}"]
    path = workdir / "my-cluster.yaml"
    path.write_text(yaml.safe_dump(copy), encoding="utf-8")
    return path


def test_they_are_found():
    assert [words[0] for words in commands()].count("launch") >= 4


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_it_runs_with_a_profile_of_ones_own(tmp_path, monkeypatch, words):
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    if "quickstart" not in words[1]:
        words = [*words, "--cluster", str(profile(tmp_path))]
    stub(tmp_path / "bin", "sbatch", "echo $RANDOM")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert not stop.value.code
    assert len(list(tmp_path.glob("runs/*/jobs.json"))) == ("--submit" in words)
