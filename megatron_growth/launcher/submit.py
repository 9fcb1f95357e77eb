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
from megatron_growth.launcher.render import Target


def is_done(link: Link, workdir: Path) -> bool:
    """Whether a stage has reached its last iteration."""
    return (workdir / link.directory / "DONE").exists()


def queue(known: Mapping[str, Mapping[str, str]]) -> dict[str, str] | None:
    """State of the jobs that still wait or run, by id or name; None where nobody can be asked."""
    both = (slurm.live(known), kubernetes.live(known))
    return None if None in both else {**(both[0] or {}), **(both[1] or {})}


def job_of(entry: Mapping[str, str]) -> str | None:
    """The id or name of a stage's job in `queue`."""
    return entry.get("job") or entry.get("trainjob")


def check_idle(experiment: Experiment, links: Sequence[Link], workdir: Path) -> None:
    """Before files are written: what waits or runs is started from these at each requeue.

    Raises:
        ConfigError: a stage that is to be started is in the queue already, or runs here.
    """
    known = jobs.read(workdir / experiment.directory)
    live = queue(known) or {}
    for link in _todo(links, workdir):
        job = job_of(known.get(link.stage.name, {}))
        if job in live:
            cancel = f"kubectl delete trainjob {job}" if job in _names(known) else f"scancel {job}"
            raise ConfigError(
                f"stage {link.stage.name!r} is job {job} already ({live[job].split()[0]}); cancel "
                f"it first with `{cancel}`, or wait"
            )
        process = here.holder(workdir / link.directory)
        if process is not None:
            raise ConfigError(
                f"stage {link.stage.name!r} runs on this machine already (process {process}); stop "
                f"it first with `kill {process}`, which lets it save, or wait"
            )


def _names(known: Mapping[str, Mapping[str, str]]) -> set[str]:
    return {entry["trainjob"] for entry in known.values() if "trainjob" in entry}


def check_ready(
    experiment: Experiment, links: Sequence[Link], target: Target, workdir: Path
) -> None:
    """What would only be found once a node is paid for.

    Raises:
        ConfigError: a secret is not set, a stage's parent will not be there, or more nodes are
            wanted than this one.
    """
    todo = _todo(links, workdir)
    if target is Target.TORCHRUN:
        _check_one_node(todo)
    if target is not Target.K8S and todo:
        _check_secrets(experiment)
    known = jobs.read(workdir / experiment.directory)
    live = queue(known) or {}
    coming = {name for name, entry in known.items() if job_of(entry) in live}
    for link in todo:
        index = experiment.stages.index(link.stage)
        parent = experiment.stages[index - 1].name if index else None
        done = parent is None or (workdir / experiment.directory / parent / "DONE").exists()
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
        yield from here.submit(todo, workdir)


def _todo(links: Sequence[Link], workdir: Path) -> list[Link]:
    return [link for link in links if not is_done(link, workdir)]
