"""What writing a grown checkpoint will do, and what it did, on a terminal and as JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from megatron_growth.checkpoint.write import Draft, Mode, Written

_GIB = 1 << 30
_PLACED = {
    "copy": "",
    "link": "hard links",
    "reflink": "shared extents",
    "symlink": "symbolic links; keep the base where it is",
}


@dataclass(frozen=True)
class Outlook:
    """What would be written.

    Attributes:
        directory: where the checkpoint would be.
        mode: how it would be written.
        written: bytes of new data files, about.
        num_written: new data files.
        placed: bytes of the base's files that would be taken over.
        num_placed: of those.
        free: bytes free there.
        left_out: files beside the base's data that would not be taken along.
        notes: what the user should know.
    """

    directory: Path
    mode: Mode
    written: int
    num_written: int
    placed: int
    num_placed: int
    free: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, draft: Draft, save: Path) -> "Outlook":
        """What `grow` would do.

        Raises:
            CheckpointError: `save` is not free.
        """
        site = draft.site(save)
        site.check_free()
        return cls(
            directory=site.final,
            mode=draft.mode,
            written=draft.nbytes,
            num_written=len(draft.files),
            placed=sum(draft.placed.values()),
            num_placed=len(draft.placed),
            free=site.free(),
            left_out=tuple(draft.left_out),
            notes=draft.notes,
        )


def document(result: Outlook | Written) -> dict[str, Any]:
    """As JSON takes it."""
    return {**asdict(result), "directory": str(result.directory)}


def print_outlook(console: Console, outlook: Outlook) -> None:
    """A dry run."""
    console.print(f"would write {outlook.directory} ({outlook.mode}); nothing was written")
    table = _table()
    table.add_row("new data", *_amount(outlook.written, outlook.num_written))
    table.add_row("taken over", *_amount(outlook.placed, outlook.num_placed))
    table.add_row("free", decimal(outlook.free), "")
    console.print(table)
    _print_notes(console, outlook)


def print_written(console: Console, written: Written) -> None:
    """What was written, and how fast."""
    console.print(f"wrote {written.directory} ({written.mode})")
    table = _table()
    table.add_row("read", decimal(written.read), "")
    table.add_row("written", *_amount(written.written, written.num_written))
    if written.num_placed:
        table.add_row("taken over", *_amount(written.placed, written.num_placed))
        table.add_row("", _PLACED[written.mode], "")
    rate = (written.read + written.written) / max(written.seconds, 1e-9) / _GIB
    table.add_row("time", f"{written.seconds:.1f} s", f"{rate:.2f} GiB/s read and written")
    table.add_row("peak memory", decimal(written.peak_memory), "")
    console.print(table)
    _print_notes(console, written)
    if written.weights_only:
        console.print("weights only: load it with --no-load-optim")


def _print_notes(console: Console, result: Outlook | Written) -> None:
    if result.left_out:
        names = ", ".join(result.left_out)
        console.print(f"not taken along, for they are no part of the model: {names}")
    for note in result.notes:
        console.print(note, soft_wrap=True)


def _amount(nbytes: int, files: int) -> tuple[str, str]:
    return decimal(nbytes), f"{files} file{'' if files == 1 else 's'}"


def _table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    return table
