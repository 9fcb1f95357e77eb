"""What a stage ran with can be told from its directory."""

import json
import subprocess

import pytest

from megatron_growth import cli
from megatron_growth.launcher.provenance import git_file
from tests.launcher.experiments import write
from tests.launcher.rendering import stub


def git(directory, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    words = ["git", "-C", str(directory), *identity, *words]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_and_whether_tracked_files_differ_from_it(tmp_path):
    assert json.loads(git_file(tmp_path))["workdir"] == {"commit": None, "dirty": None}
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/untracked").touch()
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert json.loads(git_file(tmp_path))["workdir"] == clean
    (tmp_path / "file").write_text("2")
    assert json.loads(git_file(tmp_path))["workdir"] == clean | {"dirty": True}


def test_a_package_installed_below_another_repository_is_not_of_its_commit(tmp_path, monkeypatch):
    """As a virtual environment in a checkout is."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "-m", "first", "--allow-empty")
    package = stub(tmp_path / "venv", "__init__.py", "")
    monkeypatch.setattr("megatron_growth.__file__", str(package))
    said = json.loads(git_file(tmp_path))
    assert said["workdir"]["commit"]
    assert said["megatron_growth"]["commit"] is None
    assert said["megatron_growth"]["version"]


def test_without_git_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert json.loads(git_file(tmp_path))["workdir"]["commit"] is None


def test_launch_writes_both_for_each_stage_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "do-not-tell")
    settings = ("--set", "cluster.secrets=[WANDB_API_KEY]", "--set", "cluster.environment={A: 1}")
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", str(write(tmp_path)), "--target", "slurm", *settings])
    assert not stop.value.code
    for stage in ("base", "deep", "wide"):
        directory = tmp_path / "runs/small" / stage
        said = json.loads((directory / "env.json").read_text())
        assert said["secrets"] == ["WANDB_API_KEY"]
        script = (directory / "process.sh").read_text()
        assert len(said["environment"]) > 5
        assert all(f"export {name}=" in script for name in said["environment"])
        assert said["environment"]["A"] == "1"
        assert json.loads((directory / "git.json").read_text())["workdir"].keys() == {
            "commit", "dirty",
        }  # fmt: skip
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not any("do-not-tell" in path.read_text() for path in files)
