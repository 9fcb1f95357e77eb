"""SLURM: a job for each stage, which waits for the one before by `afterok`, through all of its
requeues; when that one fails it is cancelled, and the alert job of the failed stage runs."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_growth.launcher import jobs
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.programs import answer

# All other states, REQUEUE_HOLD among them, are of jobs that may run yet.
_ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL",
    "DEADLINE", "OUT_OF_MEMORY", "REVOKED",
)  # fmt: skip


def live(known: Mapping[str, Mapping[str, str]]) -> dict[str, str] | None:
    """State of those jobs that SLURM still has waiting or running, with its reason where there is
    one: `PENDING (Dependency)`. None where there is no SLURM to ask.

    Raises:
        GrowthError: there is, and it does not answer; what runs would look like what has failed.
    """
    ids = [entry["job"] for entry in known.values() if "job" in entry]
    if not ids:
        return {}
    if shutil.which("squeue") is None:
        return None
    said = answer(["squeue", "--noheader", "--states=all", "--format=%A %T %r"])
    rows = (line.split(maxsplit=2) for line in said.splitlines())
    return {
        job: state if reason in ([], ["None"]) else f"{state} ({reason[0]})"
        for job, state, *reason in rows
        if job in ids and state not in _ENDED
    }


def submit(experiment: Experiment, links: Sequence[Link], workdir: Path) -> Iterator[str]:
    """Queue the stages, in order; a line for each."""
    directory = workdir / experiment.directory
    known = jobs.read(directory)
    running = live(known) or {}
    names = [stage.name for stage in experiment.stages]
    for link in links:
        before = names[: names.index(link.stage.name)][-1:]
        parent = known.get(before[0], {}).get("job") if before else None
        waits = parent in running
        words = [f"--dependency=afterok:{parent}", "--kill-on-invalid-dep=yes"] if waits else []
        stage = workdir / link.directory
        job = _sbatch([*words, str(stage / "job.sh")])
        running[job] = "PENDING"
        known[link.stage.name] = {"job": job}
        # At once: what follows may fail, and it is in the queue.
        jobs.record(directory, link.stage.name, {"job": job})
        if experiment.cluster.slurm.alert:
            words = [f"--dependency=afternotok:{job}", "--kill-on-invalid-dep=yes"]
            alert = _sbatch([*words, str(stage / "alert.sh"), job])
            jobs.record(directory, link.stage.name, {"job": job, "alert": alert})
        yield f"{link.stage.name}: job {job}" + (f", after job {parent}" if waits else "")


def _sbatch(words: list[str]) -> str:
    return answer(["sbatch", "--parsable", *words]).strip().split(";")[0]
