"""What was launched under this name before, and whether the file still says the same of it.

A stage that runs or has checkpoints goes on, and one that is done is passed over, whatever the file
says by then. So what made them may not be said otherwise: the run would look like something it
is not. Layouts, nodes, intervals and clusters may change from one start to the next.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from megatron_growth.errors import ConfigError
from megatron_growth.launcher.chain import Link, chain
from megatron_growth.launcher.experiment import Experiment, load_experiment
from megatron_growth.launcher.marks import is_done, saved_iteration

RESOLVED = "experiment.yaml"
# What the weights of a stage come from, beside its model.
_FROM_SCRATCH = ("learning_rate", "global_batch_size")
_FROM_A_BASE = ("growth", "continue")
_DONE = ("budget", *_FROM_SCRATCH, *_FROM_A_BASE)
_DATA = ("tokenizer", "tokenizer_model")


def check_unchanged(
    experiment: Experiment, links: list[Link], running: Collection[str], workdir: Path
) -> None:
    """Compare with the experiment as it was launched last.

    Args:
        experiment: as it is now.
        links: its stages.
        running: names of those that run.
        workdir: directory that the relative paths of the experiment start from.

    Raises:
        ConfigError: a stage that has begun would now come from something else.
    """
    path = workdir / experiment.directory / RESOLVED
    begun = [link for link in links if link.stage.name in running or _saved(link, workdir)]
    if not begun or not path.exists():
        return
    before = _read(path)
    for where, old, new in _changes(before, experiment, links, begun, workdir):
        raise ConfigError(
            f"{where} is {new!r}, but what is in {str(experiment.directory)!r} was launched with "
            f"{old!r}; put it back, or launch under another name with --set name=...; if it is but "
            f"the same at another place, move {str(path)!r} away"
        )


def _read(path: Path) -> Experiment:
    try:
        return load_experiment(path)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; another version wrote this file, so it cannot be seen whether stages are "
            "what they were: compare them yourself, and move it away to go on"
        ) from None


def _saved(link: Link, workdir: Path) -> bool:
    directory = workdir / link.directory
    return is_done(directory) or saved_iteration(directory) is not None


def _changes(
    before: Experiment, now: Experiment, links: list[Link], begun: list[Link], workdir: Path
) -> Iterator[tuple[str, Any, Any]]:
    """Path, old and new value of what must not change."""
    old, new = _content(before), _content(now)
    was = {link.stage.name: link for link in chain(before)}
    names, old_names = [link.stage.name for link in links], list(was)
    yield from _leaves(old["model"], new["model"], "model")
    for field in _DATA:
        yield from _leaves(old["data"][field], new["data"][field], f"data.{field}")
    if not _saved(links[0], workdir):  # then it needs the base no more
        parent, now_parent = (
            one and one.model_dump(mode="json")
            for one in (next(iter(was.values())).parent, links[0].parent)
        )
        yield from _leaves(parent, now_parent, "base")
    for link in begun:
        name, index = link.stage.name, names.index(link.stage.name)
        if old_names[: index + 1] != names[: index + 1]:
            yield "the order of stages", old_names, names
            return
        fields = _FROM_SCRATCH if link.growth is None else _FROM_A_BASE
        for field in _DONE if is_done(workdir / link.directory) else fields:
            yield from _leaves(
                old["stages"][index][field], new["stages"][index][field], f"{link.path}.{field}"
            )
        yield from _leaves(was[name].first, link.first, f"the first iteration of {link.path}")
        if is_done(workdir / link.directory):
            yield from _leaves(was[name].last, link.last, f"the last iteration of {link.path}")


def _content(experiment: Experiment) -> dict[str, Any]:
    return experiment.model_dump(mode="json", by_alias=True)


def _leaves(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _leaves(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield path, old, new
