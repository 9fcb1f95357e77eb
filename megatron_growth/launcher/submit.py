"""Hand stages to SLURM, to Kubernetes, or to this machine, once it is sure that they can start.

A stage that is DONE is passed over, so the same command takes a broken chain up again.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_growth.errors import ConfigError
from megatron_growth.launcher import here, jobs, kubernetes, slurm
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.marks import is_done
from megatron_growth.launcher.render import Target


def queues(known: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str] | None]:
    """For each stage that was handed over: the jobs of its cluster that still wait or run, with
    their states; None where nobody can be asked."""
    slurms, trainjobs = slurm.live(known), kubernetes.live(known)
    return {stage: slurms if "job" in entry else trainjobs for stage, entry in known.items()}


def job_of(entry: Mapping[str, str]) -> str | None:
    """The id or name of a stage's job in its queue."""
    return entry.get("job") or entry.get("trainjob")


def live_stages(experiment: Experiment, links: Sequence[Link], workdir: Path) -> dict[str, str]:
    """Which stages wait or run, and as what with the remedy, for errors.

    Raises:
        ConfigError: one that is not done was handed over, and nobody here can tell.
    """
    directory = workdir / experiment.directory
    known = jobs.read(directory)
    asked = queues(known)
    found: dict[str, str] = {}
    for link in _todo(links, workdir):
        name = link.stage.name
        job = job_of(known.get(name, {}))
        if job is not None:
            found |= _live(name, job, known[name], asked[name], directory)
        process = here.holder(workdir / link.directory)
        if process is not None:
            found[name] = f"runs on this machine already {_how_to_stop(process)}"
    return found


def _live(
    stage: str,
    job: str,
    entry: Mapping[str, str],
    asked: Mapping[str, str] | None,
    directory: Path,
) -> dict[str, str]:
    if asked is None:
        program = "squeue" if "job" in entry else "kubectl"
        raise ConfigError(
            f"stage {stage!r} was handed over as job {job}, and there is no {program} here to ask "
            f"whether it runs; launch from where there is, or remove {str(directory / jobs.FILE)!r}"
        )
    if job not in asked:
        return {}
    cancel = f"scancel {job}"
    if "trainjob" in entry:
        cancel = f"kubectl delete trainjob {job} --namespace {entry['namespace']}"
    return {stage: f"is job {job} already ({asked[job].split()[0]}); cancel it with `{cancel}`"}


def _how_to_stop(process: str) -> str:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        words = b""
    if b"node.sh" in words:
        return f"(process {process}); stop it with `kill {process}`, which lets it save"
    return "(its node.sh has ended, something that it started has not); end that: `fuser` finds it"


def check_idle(links: Sequence[Link], live: Mapping[str, str]) -> None:
    """Before files are written: what waits or runs is started from these at each requeue.

    Raises:
        ConfigError: a stage that is to be started is in the queue already, or runs here.
    """
    for link in links:
        if link.stage.name in live:
            raise ConfigError(f"stage {link.stage.name!r} {live[link.stage.name]}, or wait")


def check_ready(
    experiment: Experiment,
    links: Sequence[Link],
    live: Mapping[str, str],
    target: Target,
    workdir: Path,
) -> None:
    """What would only be found once a node is paid for.

    Raises:
        ConfigError: a secret is not set, a stage's parent will not be there, more nodes are wanted
            than this one, or a TrainJob of that name is somebody else's.
    """
    todo = _todo(links, workdir)
    if target is Target.TORCHRUN:
        _check_one_node(todo)
    if target is not Target.K8S and todo:
        _check_secrets(experiment)
    if target is Target.K8S and todo:
        kubernetes.check(experiment, todo[0], workdir)
    # With SLURM a stage waits for one that is queued; nothing else does.
    coming = set(live) if target is Target.SLURM else set()
    for link in todo:
        index = experiment.stages.index(link.stage)
        parent = experiment.stages[index - 1].name if index else None
        done = parent is None or is_done(workdir / experiment.directory / parent)
        if not done and parent not in coming:
            raise ConfigError(
                f"{link.path} ({link.stage.name!r}): the stage before, {parent!r}, is neither done "
                "nor queued; launch it too, without --stage"
            )
        coming.add(link.stage.name)


def _check_one_node(links: Sequence[Link]) -> None:
    for link in links:
        if link.stage.nodes > 1:
            raise ConfigError(
                f"{link.path}.nodes {link.stage.nodes}: --submit with torchrun runs here alone; "
                "launch without it, and run node.sh on each node, as it says"
            )


def _check_secrets(experiment: Experiment) -> None:
    missing = [name for name in experiment.cluster.secrets if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"cluster.secrets: {', '.join(missing)} not set here, and its processes take them from "
            "this shell; export them, or take them off the list"
        )


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
    if target is Target.SLURM:
        yield from slurm.submit(experiment, todo, workdir)
    elif target is Target.K8S:
        yield from kubernetes.submit(experiment, todo, workdir)
    else:
        yield from here.submit(experiment, todo, workdir)


def _todo(links: Sequence[Link], workdir: Path) -> list[Link]:
    return [link for link in links if not is_done(workdir / link.directory)]
