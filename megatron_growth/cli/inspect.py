"""`megatron-growth inspect`: what a checkpoint holds."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, TransferSpeedColumn

from megatron_growth.checkpoint.norms import LayerScale, scale_bytes, weight_scales
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.cli.shared import AsJson, bar, print_json
from megatron_growth.quiet import quiet
from megatron_growth.report.inspection import (
    checkpoint_directory,
    inspect_checkpoint,
    known_tensors,
)
from megatron_growth.report.plot import check_path, plot_scales
from megatron_growth.report.tables import print_inspection


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Megatron checkpoint directory, or one iter_* in it.", show_default=False
        ),
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Write the weight scale by layer as a figure.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds, whether it can be grown, and the weight scale of its layers."""
    if plot:
        check_path(plot)  # before the weights are read, which takes its time
    with quiet():
        source = SourceCheckpoint(checkpoint_directory(checkpoint))
        inspection = inspect_checkpoint(source, _measured(source))
    if plot:
        plot_scales(
            inspection.scales,
            plot,
            f"Weight scale by layer, {'/'.join(source.directory.parts[-2:])}",
        )
    if as_json:
        print_json(inspection.document())
    else:
        print_inspection(Console(), inspection)


def _measured(source: SourceCheckpoint) -> tuple[LayerScale, ...]:
    """Weight scales."""
    tensors = known_tensors(source)
    total, done = scale_bytes(tensors), 0

    with bar("reading weights", DownloadColumn(), TransferSpeedColumn()) as show:

        def more(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            show(done, total)

        return weight_scales(source, tensors, more)
