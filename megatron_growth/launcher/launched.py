"""What was launched under this name before, and whether the file still says the same of it.

A stage that has checkpoints goes on from them, and one that is done is passed over, whatever the
file says by then. So what made them may not be said otherwise: the run would look like something it
is not. Layouts, nodes, intervals and clusters may change from one start to the next.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_growth.errors import ConfigError
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment, load_experiment

RESOLVED = "experiment.yaml"
# What the weights of a stage come from. A run that goes on is held to its growth here, to its rates
# by Megatron; its budget may change until it is done.
_STARTED = ("growth",)
_DONE = ("growth", "continue", "learning_rate", "global_batch_size", "budget")
_DATA = ("tokenizer", "tokenizer_model")


def check_unchanged(experiment: Experiment, links: list[Link], workdir: Path) -> None:
    """Compare with the experiment as it was launched last.

    Raises:
        ConfigError: a stage that has checkpoints would now come from something else.
    """
    path = workdir / experiment.directory / RESOLVED
    begun = [link for link in links if _is_begun(workdir / link.directory)]
    if not begun or not path.exists():
        return
    before, now = _content(_read(path)), _content(experiment)
    for where, old, new in _changes(before, now, begun, workdir):
        raise ConfigError(
            f"{where} is {new!r}, but what is in {str(experiment.directory)!r} was launched with "
            f"{old!r}; put it back, or launch under another name with --set name=..."
        )


def _read(path: Path) -> Experiment:
    try:
        return load_experiment(path)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; another version wrote this file, so it cannot be seen whether stages are "
            "what they were: compare them yourself, and move it away to go on"
        ) from None


def _is_begun(directory: Path) -> bool:
    tracker = directory / "checkpoints" / "latest_checkpointed_iteration.txt"
    return tracker.exists() or (directory / "DONE").exists()


def _content(experiment: Experiment) -> dict[str, Any]:
    return experiment.model_dump(mode="json", by_alias=True)


def _changes(
    before: dict[str, Any], now: dict[str, Any], begun: list[Link], workdir: Path
) -> Iterator[tuple[str, Any, Any]]:
    """Path, old and new value of what must not change."""
    yield from _leaves(before["base"], now["base"], "base")
    yield from _leaves(before["model"], now["model"], "model")
    for field in _DATA:
        yield from _leaves(before["data"][field], now["data"][field], f"data.{field}")
    old_names, new_names = (
        [stage["name"] for stage in content["stages"]] for content in (before, now)
    )
    for link in begun:
        name, index = link.stage.name, new_names.index(link.stage.name)
        if name not in old_names or old_names[: old_names.index(name)] != new_names[:index]:
            yield "the order of stages", old_names, new_names
            return
        old, new = before["stages"][old_names.index(name)], now["stages"][index]
        done = (workdir / link.directory / "DONE").exists()
        for field in _DONE if done else _STARTED:
            yield from _leaves(old[field], new[field], f"{link.path}.{field}")


def _leaves(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _leaves(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield path, old, new
