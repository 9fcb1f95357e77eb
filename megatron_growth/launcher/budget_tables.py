"""A budget on a terminal: a column for each stage."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from megatron_growth.launcher.budget import StageBudget

_ROWS: tuple[tuple[str, Callable[[StageBudget], str]], ...] = (
    ("layers, PP x VPP", lambda s: f"{s.layers}, {s.chunks[0]} x {s.chunks[1]}"),
    ("experts, top-k", lambda s: f"{s.experts}, {s.top_k}"),
    ("parameters", lambda s: _count(s.parameters)),
    ("activated", lambda s: _count(s.activated)),
    ("FLOPs per token", lambda s: f"{s.flops_per_token:.3g}"),
    ("iterations", lambda s: f"{s.iterations[0]} - {s.iterations[1]}"),
    ("tokens", lambda s: _count(s.tokens)),
    ("FLOPs sunk", lambda s: "unknown" if s.sunk is None else f"{s.sunk:.3g}"),
    ("FLOPs extra", lambda s: f"{s.flops:.3g}"),
    ("F_c of its base", lambda s: "-" if s.boundary is None else f"{s.boundary:.3g}"),
    ("GPUs", lambda s: str(s.gpus)),
    ("memory of the fullest", lambda s: decimal(s.memory.total)),
    ("  weights", lambda s: decimal(s.memory.weights)),
    ("  gradients", lambda s: decimal(s.memory.gradients)),
    ("  optimizer", lambda s: decimal(s.memory.optimizer)),
    ("  activations", lambda s: decimal(s.memory.activations)),
    ("  on pipeline rank", lambda s: str(s.memory.pipeline_rank)),
    ("all-to-all a layer", lambda s: decimal(s.all_to_all)),
    ("  before growth", lambda s: _or_dash(s.all_to_all_before)),
    ("checkpoint", lambda s: decimal(s.checkpoint)),
    ("delivered to a rank", lambda s: decimal(s.load)),
)


_STYLES = {"error": "bold red", "warning": "bold yellow", "information": "bold"}


def print_budget(console: Console, title: str, stages: Sequence[StageBudget]) -> None:
    """All of it, then what is worth knowing."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    for name, cell in _ROWS:
        table.add_row(name, *map(cell, stages))
    console.print(table)
    for stage in stages:
        for note in stage.notes:
            path = (f"{note.path}: ", _STYLES[note.severity])
            console.print(Text.assemble(path, note.text), soft_wrap=True)


def _or_dash(number: int | None) -> str:
    return "-" if number is None else decimal(number)


def _count(number: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return str(number)
