"""Rendering for tests: an experiment's files, written below a directory."""

from collections.abc import Sequence
from pathlib import Path

from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.render import Target, stage_files
from tests.launcher.experiments import write


def rendered(
    directory: Path, target: Target, *settings: str, experiment: Path | None = None
) -> dict[str, str]:
    """Files by their name below the experiment's directory: `deep/job.sh`."""
    loaded = load_experiment(experiment or write(directory), settings)
    files = {}
    for link in chain(loaded):
        for file in stage_files(loaded, link, target, directory):
            file.path.parent.mkdir(parents=True, exist_ok=True)
            file.path.write_text(file.text, encoding="utf-8")
            files[f"{link.stage.name}/{file.path.name}"] = file.text
    return files


def stub(directory: Path, name: str, script: str) -> Path:
    """An executable that stands for a program."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def lines(path: Path) -> Sequence[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
