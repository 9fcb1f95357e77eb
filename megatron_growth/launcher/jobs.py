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
    """Note a stage's job, whole or not at all."""
    known = {**read(directory), stage: dict(job)}
    new = directory / f"{FILE}.new"
    new.write_text(json.dumps(known, indent=2), encoding="utf-8")
    new.replace(directory / FILE)
