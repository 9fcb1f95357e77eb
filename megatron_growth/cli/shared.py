"""What the commands share: options, the growth that they name, a progress bar, JSON."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

from megatron_growth.checkpoint.directory import iteration_directory
from megatron_growth.config import BaseConfig, GrowthFile, load_config
from megatron_growth.errors import ConfigError

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change the file, as in --set growth.width.factor=2. Repeatable.",
        show_default=False,
    ),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        "--cluster",
        help="Cluster profile, a YAML file, instead of the experiment's.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def configured(config: Path | None, settings: Sequence[str] | None) -> GrowthFile:
    if config is None and not settings:
        raise ConfigError(
            "nothing says how to grow; give a configuration file, or --set growth.depth.factor=2 "
            "and the like"
        )
    return load_config(config, settings or ())


def base_directory(base: BaseConfig, load: Path | None, config: Path | None) -> Path:
    directory = load or base.load
    if directory is None:
        raise ConfigError(
            f"{config or '--set'} names no base checkpoint; set base.load in it or give --load"
        )
    return iteration_directory(directory, base.iteration)


@contextmanager
def bar(name: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; what it gives takes bytes done and in
    all."""
    console = Console(stderr=True)
    with Progress(
        TextColumn(name), BarColumn(), *columns,
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_json(document: dict[str, Any] | list[dict[str, Any]]) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))
