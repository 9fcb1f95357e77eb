"""`megatron-growth grow`: the grown checkpoint, to disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_growth.checkpoint import write
from megatron_growth.checkpoint.write import Crew, Draft, Mode, Written
from megatron_growth.cli.shared import (
    AsJson,
    Settings,
    bar,
    base_directory,
    configured,
    print_json,
)
from megatron_growth.quiet import quiet
from megatron_growth.report.writing import Outlook, document, print_outlook, print_written


def grow(
    config: Annotated[
        Path | None, typer.Argument(help="Growth configuration, a YAML file.", show_default=False)
    ] = None,
    *,
    save: Annotated[
        Path,
        typer.Option(
            help="New directory, which becomes a Megatron checkpoint directory.",
            show_default=False,
        ),
    ],
    load: Annotated[
        Path | None, typer.Option(help="Base checkpoint directory, instead of the file's.")
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="copy: bytes of its own. link: hard links to the base's files and new files for "
            "what differs; reflink, symlink: likewise."
        ),
    ] = "copy",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, on each rank if started by torchrun.")
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted growth.")
    ] = False,
    checksum: Annotated[
        bool, typer.Option("--checksum", help="Check the base's data against its checksums first.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
    ] = False,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write the grown checkpoint to disk, without Megatron's training stack and without a GPU."""
    with quiet(), Crew(workers) as crew:
        draft = crew.together(lambda: _draft(config, settings, load, mode))
        if dry_run:
            result: Outlook | Written | None = crew.first(lambda: Outlook.of(draft, save))
        else:
            result = _written(draft, save, crew, resume, checksum)
    if result is None:  # another rank speaks
        return
    if as_json:
        print_json(document(result))
    elif isinstance(result, Outlook):
        print_outlook(Console(), result)
    else:
        print_written(Console(), result)


def _draft(
    config: Path | None, settings: Sequence[str] | None, load: Path | None, mode: Mode
) -> Draft:
    file = configured(config, settings)
    given = load or file.base.load
    directory = base_directory(file.base, load, config)
    return Draft(directory, file.growth, mode, given, file.continue_)


def _written(draft: Draft, save: Path, crew: Crew, resume: bool, checksum: bool) -> Written | None:
    """The growth, with a progress bar where someone watches."""
    with bar("writing", DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as show:
        return write.grow(
            draft, save, crew=crew, resume=resume, checksum=checksum, on_progress=show
        )
