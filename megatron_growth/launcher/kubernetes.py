"""Kubernetes: a TrainJob for a stage. It knows no `afterok`, so one stage is applied at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_growth.errors import ConfigError
from megatron_growth.launcher import jobs
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.programs import answer

# Conditions of a TrainJob that has ended, and what is said of one that has not.
_ENDED = ("Complete", "Failed")
_WAITS = "Suspended"
# On a TrainJob: the stage's directory, which it is of.
ANNOTATION = "megatron-growth.io/directory"


def live(known: Mapping[str, Mapping[str, str]]) -> dict[str, str] | None:
    """State of those TrainJobs that have not ended, in SLURM's words: `RUNNING`, `PENDING
    (Suspended)`. None where Kubernetes cannot be asked.

    Raises:
        GrowthError: it does not answer.
    """
    asked = [entry for entry in known.values() if "trainjob" in entry]
    if not asked:
        return {}
    if shutil.which("kubectl") is None:
        return None
    found = {entry["trainjob"]: _found(entry["trainjob"], entry["namespace"]) for entry in asked}
    states = {name: _state(job) for name, job in found.items() if job is not None}
    return {name: state for name, state in states.items() if state not in _ENDED}


def check(experiment: Experiment, link: Link, workdir: Path) -> None:
    """Before a stage's TrainJob is made.

    Raises:
        ConfigError: there is one of its name that is not of this stage, or that lives.
    """
    name, namespace = job_name(experiment, link), experiment.cluster.kubernetes.namespace
    job = _found(name, namespace)
    if job is None:
        return
    own = str(workdir / link.directory)
    other = job["metadata"].get("annotations", {}).get(ANNOTATION)
    if other != own:
        raise ConfigError(
            f"namespace {namespace!r} has a TrainJob {name!r} of {other or 'somebody else'!r}, not "
            f"of {own!r}; launch under another name with --set name=..."
        )
    if _state(job) not in _ENDED:
        raise ConfigError(
            f"TrainJob {name!r} is {_state(job)}; wait for it, or end it with `kubectl delete "
            f"trainjob {name} --namespace {namespace}`"
        )


def submit(experiment: Experiment, links: Sequence[Link], workdir: Path) -> Iterator[str]:
    """Apply the first stage, which `check` has seen."""
    if not links:
        return
    first, *rest = links
    name, namespace = job_name(experiment, first), experiment.cluster.kubernetes.namespace
    if _found(name, namespace):  # ended; its specification cannot be applied again
        answer(["kubectl", "delete", "trainjob", name, "--namespace", namespace])
    answer(["kubectl", "apply", "-f", str(workdir / first.directory / "trainjob.yaml")])
    job = {"trainjob": name, "namespace": namespace}
    jobs.record(workdir / experiment.directory, first.stage.name, job)
    yield f"{first.stage.name}: TrainJob {name}"
    if rest:
        names = ", ".join(link.stage.name for link in rest)
        yield f"not started: {names}; submit again once {first.stage.name} is done"


def job_name(experiment: Experiment, link: Link) -> str:
    """The TrainJob's `metadata.name`."""
    return f"{experiment.name}-{link.stage.name}"


def _found(name: str, namespace: str) -> dict[str, Any] | None:
    """The TrainJob of that name, None where there is none."""
    words = ["kubectl", "get", "trainjob", name, "--namespace", namespace]
    said = answer([*words, "--ignore-not-found", "--output", "json"])
    return dict(json.loads(said)) if said.strip() else None


def _state(job: Mapping[str, Any]) -> str:
    """`Complete`, `Failed`, `PENDING (Suspended)` or `RUNNING`."""
    conditions = job.get("status", {}).get("conditions", [])
    true = [one["type"] for one in conditions if one["status"] == "True"]
    ended = next((one for one in _ENDED if one in true), None)
    return ended or (f"PENDING ({_WAITS})" if _WAITS in true else "RUNNING")
