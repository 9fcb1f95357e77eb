"""Kubernetes: a TrainJob for a stage. It knows no `afterok`, so one stage is applied at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_growth.launcher import jobs
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.programs import answer

# Conditions of a TrainJob that has ended, and what is said of one that has not.
_ENDED = ("Complete", "Failed")
_WAITS = "Suspended"


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
    states = {entry["trainjob"]: _state(entry["trainjob"], entry["namespace"]) for entry in asked}
    return {name: state for name, state in states.items() if state not in (None, *_ENDED)}


def submit(experiment: Experiment, links: Sequence[Link], workdir: Path) -> Iterator[str]:
    """Apply the first stage; the caller has seen that none of its jobs is live."""
    if not links:
        return
    first, *rest = links
    name, namespace = job_name(experiment, first), experiment.cluster.kubernetes.namespace
    if _state(name, namespace) in _ENDED:  # its specification cannot be applied again
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


def _state(name: str, namespace: str) -> str | None:
    """`Complete`, `Failed`, `PENDING (Suspended)` or `RUNNING`; None where there is no such job."""
    words = ["kubectl", "get", "trainjob", name, "--namespace", namespace]
    said = answer([*words, "--ignore-not-found", "--output", "json"])
    if not said.strip():
        return None
    conditions = json.loads(said).get("status", {}).get("conditions", [])
    true = [one["type"] for one in conditions if one["status"] == "True"]
    ended = next((one for one in _ENDED if one in true), None)
    return ended or (f"PENDING ({_WAITS})" if _WAITS in true else "RUNNING")
