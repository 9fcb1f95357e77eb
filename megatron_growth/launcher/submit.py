"""Hand stages to SLURM, to Kubernetes, or to this machine, one after the other.

With SLURM a stage waits for the one before by `afterok`, through all of its requeues; when that one
fails it is cancelled, and the alert job of the failed stage runs. Job ids are kept in `jobs.json`.
A stage that is DONE is passed over, so the same command takes a broken chain up again.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_growth.errors import ConfigError, GrowthError
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.render import Target

JOBS = "jobs.json"


def is_done(link: Link, workdir: Path) -> bool:
    """Whether a stage has reached its last iteration."""
    return (workdir / link.directory / "DONE").exists()


def submit(
    experiment: Experiment, links: Sequence[Link], target: Target, workdir: Path
) -> Iterator[str]:
    """Start the stages whose files are written; yields a line for each.

    Args:
        experiment: it all.
        links: the stages to start, in order.
        target: how.
        workdir: directory that the relative paths of the experiment start from.

    Raises:
        GrowthError: it could not be started, or, on this machine, a stage failed.
    """
    todo = _todo(links, workdir)
    for link in links:
        if link not in todo:
            yield f"{link.stage.name}: done already"
    start = {Target.SLURM: _slurm, Target.K8S: _kubernetes, Target.TORCHRUN: _here}[target]
    yield from start(experiment, todo, workdir)


def _todo(links: Sequence[Link], workdir: Path) -> list[Link]:
    return [link for link in links if not is_done(link, workdir)]


def check_idle(experiment: Experiment, links: Sequence[Link], workdir: Path) -> None:
    """Before files are written: a job that waits or runs starts from these at each requeue.

    Raises:
        ConfigError: a stage that is to be started is in the queue already.
    """
    known = jobs(workdir / experiment.directory)
    live = queue([entry["job"] for entry in known.values()]) or {}
    for link in _todo(links, workdir):
        job = known.get(link.stage.name, {}).get("job", "")
        if job in live:
            raise ConfigError(
                f"stage {link.stage.name!r} is job {job} already ({live[job].split()[0]}); cancel "
                f"it first with `scancel {job}`, or wait"
            )


def jobs(directory: Path) -> dict[str, dict[str, str]]:
    """The jobs of an experiment's stages: `job`, and `alert` where there is one."""
    path = directory / JOBS
    found: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return dict(found)


def queue(ids: Sequence[str]) -> dict[str, str] | None:
    """State of those jobs that SLURM still has waiting or running, with its reason where there is
    one: `PENDING (Dependency)`. None where there is no SLURM to ask.

    Raises:
        GrowthError: there is, and it does not answer; what runs would look like what has failed.
    """
    if not ids:
        return {}
    if shutil.which("squeue") is None:
        return None
    said = _run(["squeue", "--noheader", "--states=all", "--format=%A %T %r"])
    rows = (line.split(maxsplit=2) for line in said.splitlines())
    live = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "STOPPED")
    return {
        job: state if reason in ([], ["None"]) else f"{state} ({reason[0]})"
        for job, state, *reason in rows
        if job in ids and state in live
    }


def _slurm(experiment: Experiment, links: Sequence[Link], workdir: Path) -> Iterator[str]:
    directory = workdir / experiment.directory
    known = jobs(directory)
    live = queue([entry["job"] for entry in known.values()]) or {}
    names = [stage.name for stage in experiment.stages]
    for link in links:
        before = names[: names.index(link.stage.name)][-1:]
        parent = known.get(before[0], {}).get("job") if before else None
        waits = parent in live
        words = [f"--dependency=afterok:{parent}", "--kill-on-invalid-dep=yes"] if waits else []
        stage = workdir / link.directory
        (stage / "slurm").mkdir(exist_ok=True)
        (stage / "ranks").mkdir(exist_ok=True)
        job = _sbatch([*words, str(stage / "job.sh")])
        live[job] = "PENDING"
        known[link.stage.name] = {"job": job}
        _record(directory / JOBS, known)  # at once: what follows may fail, and it is in the queue
        if experiment.cluster.slurm.alert:
            words = [f"--dependency=afternotok:{job}", "--kill-on-invalid-dep=yes"]
            known[link.stage.name]["alert"] = _sbatch([*words, str(stage / "alert.sh"), job])
            _record(directory / JOBS, known)
        yield f"{link.stage.name}: job {job}" + (f", after job {parent}" if waits else "")


def _sbatch(words: list[str]) -> str:
    return _run(["sbatch", "--parsable", *words]).strip().split(";")[0]


def _record(path: Path, known: dict[str, dict[str, str]]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(known, indent=2), encoding="utf-8")
    new.replace(path)


def _kubernetes(experiment: Experiment, links: Sequence[Link], workdir: Path) -> Iterator[str]:
    """Kubernetes knows no `afterok`: the first stage that is not done."""
    for link in links[:1]:
        yield _run(["kubectl", "apply", "-f", str(workdir / link.directory / "trainjob.yaml")])
    if links[1:]:
        rest = ", ".join(link.stage.name for link in links[1:])
        yield f"not started: {rest}; submit again once {links[0].stage.name} is done"


def _here(experiment: Experiment, links: Sequence[Link], workdir: Path) -> Iterator[str]:
    for link in links:
        if link.stage.nodes > 1:
            raise ConfigError(
                f"{link.path}.nodes {link.stage.nodes}: --submit with torchrun runs here "
                f"alone; run {str(link.directory / 'node.sh')!r} on each node, as it says"
            )
    for link in links:
        yield f"{link.stage.name}: running"
        script = workdir / link.directory / "node.sh"
        code = subprocess.run(["bash", str(script)], check=False).returncode
        if code:
            raise GrowthError(
                f"stage {link.stage.name!r} ended with exit code {code}; see "
                f"{str(link.directory / 'ranks')!r}, put it right, and launch again to go on"
            )
        yield f"{link.stage.name}: done"


def _run(words: list[str], *, check: bool = True) -> str:
    """A command's output.

    Raises:
        GrowthError: it is not there, or failed.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise GrowthError(
            f"{words[0]!r} is not on this machine; submit from one that has it "
            f"({os.uname().nodename!r} has not)"
        ) from None
    if check and done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise GrowthError(f"{' '.join(words)} failed with exit code {done.returncode}: {said}")
    return done.stdout
