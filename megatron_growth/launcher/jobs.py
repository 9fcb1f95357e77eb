"""`jobs.json`: which job each stage was handed over as, kept from the moment that it is."""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_growth.errors import GrowthError

FILE = "jobs.json"
Jobs = dict[str, dict[str, str]]


def read(directory: Path) -> Jobs:
    """The jobs of an experiment's stages: `job` with SLURM, and `alert` where there is one;
    `trainjob` and `namespace` with Kubernetes.

    Raises:
        GrowthError: the file is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return {}
    try:
        return {str(stage): dict(job) for stage, job in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise GrowthError(
            f"{str(path)!r} is damaged ({error}); see with `squeue` or `kubectl` that nothing of "
            "it runs, and remove it"
        ) from None


def record(directory: Path, stage: str, job: Mapping[str, str]) -> None:
    """Note a stage's job."""
    _write(directory, {**read(directory), stage: dict(job)})


def forget(directory: Path, stage: str) -> None:
    """A stage's job is over; something else runs it now."""
    known = read(directory)
    if known.pop(stage, None):
        _write(directory, known)


def _write(directory: Path, known: Jobs) -> None:
    """Whole or not at all."""
    new = directory / f"{FILE}.new"
    new.write_text(json.dumps(known, indent=2), encoding="utf-8")
    new.replace(directory / FILE)
