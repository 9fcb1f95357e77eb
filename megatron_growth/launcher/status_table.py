"""The stages of an experiment on a terminal."""

from collections.abc import Sequence
from datetime import timedelta

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_growth.launcher.status import StageStatus

_STYLES = {"waiting": "dim", "running": "bold cyan", "done": "bold green", "failed": "bold red"}


def print_status(console: Console, title: str, stages: Sequence[StageStatus]) -> None:
    """One row for each stage; why one failed below, in full."""
    columns = ("iteration", "saved", "loss", "tokens/s", "time left")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True, overflow="fold")
    table.add_column("state", no_wrap=True, min_width=7)
    for column in columns:
        table.add_column(column, justify="right")
    for stage in stages:
        state = Text(stage.state, style=_STYLES[stage.state])
        table.add_row(stage.name, state, *_cells(stage))
    console.print(table)
    for stage in stages:
        if stage.why:
            console.print(Text(f"{stage.name}: {stage.why}"), soft_wrap=True)


def _cells(stage: StageStatus) -> tuple[str, ...]:
    saved = "-" if stage.saved is None else str(stage.saved)
    progress = stage.progress
    if progress is None:
        return f"- / {stage.last}", saved, "-", "-", "-"
    left = timedelta(seconds=round(progress.seconds_left))
    return (
        f"{progress.iteration} / {stage.last}",
        saved,
        "-" if progress.loss is None else f"{progress.loss:.4f}",
        f"{progress.tokens_per_second:,.0f}",
        str(left) if stage.state == "running" else "-",
    )
