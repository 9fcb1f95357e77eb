"""`megatron-growth verify`: a grown checkpoint against its definition."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import DownloadColumn, TransferSpeedColumn

from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint import verify as verification
from megatron_growth.checkpoint.directory import TRACKER, iteration_directory
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.checkpoint.verify import Verification
from megatron_growth.cli.shared import AsJson, bar, print_json
from megatron_growth.config import GrowthConfig, load_config
from megatron_growth.planning.plan import GrowthPlan
from megatron_growth.quiet import quiet
from megatron_growth.report.inspection import checkpoint_directory
from megatron_growth.report.verification import print_verification, verification_document

if TYPE_CHECKING:
    from megatron_growth.training.forward import Forward


def verify(
    base: Annotated[
        Path,
        typer.Argument(help="Base checkpoint directory, or one iter_* in it.", show_default=False),
    ],
    grown: Annotated[
        Path | None,
        typer.Argument(
            help="Grown checkpoint, not yet trained on; the view of the base by default."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="How it was grown, instead of the manifest beside it.")
    ] = None,
    forward: Annotated[
        bool, typer.Option("--forward", help="Also run both models on the same text.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check that a grown checkpoint is, bit for bit, what its plan makes of the base, or exit 1."""
    growth = load_config(config).growth if config else None
    with quiet():
        result = _verified(
            checkpoint_directory(base), grown and checkpoint_directory(grown), growth
        )
        both = _forward(base, grown, config) if forward else None
    if as_json:
        print_json(verification_document(result, both))
    else:
        print_verification(Console(), result, both)
    if not result.passed or (both and not both.passed):
        raise typer.Exit(1)


def _verified(base: Path, grown: Path | None, growth: GrowthConfig | None) -> Verification:
    with bar("comparing", DownloadColumn(), TransferSpeedColumn()) as show:
        return verification.verify(base, grown, growth=growth, on_progress=show)


def _forward(base: Path, grown: Path | None, config: Path | None) -> "Forward":
    """Base and grown model on the same text, each in a process of its own."""
    from megatron_growth.training.forward import compare  # brings Megatron in

    base, grown = _root(base), grown and _root(grown)
    if config is not None:
        growth = load_config(config).growth
        weights_only = growth.optimizer == "reset"
        plan = plan_for(
            SourceCheckpoint(iteration_directory(base), weights_only=weights_only), growth
        )
    else:
        assert grown is not None  # or there had been nothing to verify
        plan = GrowthPlan.from_json(json.dumps((manifest.read(grown) or {})["plan"]))
    return compare(base, plan, grown=grown, config=config)


def _root(checkpoint: Path) -> Path:
    """Megatron's directory of checkpoints, of that or of one iteration in it."""
    return checkpoint if (checkpoint / TRACKER).exists() else checkpoint.parent
