"""The `megatron-growth` command: `plan` growth, `inspect` and `verify` checkpoints, run the `demo`.

A skin over the library: each command is a few lines. `plan`, `inspect` and `verify` only read;
growing happens in `python -m megatron_growth.pretrain`, while Megatron loads. Exit codes: 0 done, 1
not verified, 2 for the user to put right.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint.norms import LayerScale, scale_bytes, weight_scales
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import TRACKER, SourceCheckpoint, iteration_directory
from megatron_growth.checkpoint.verify import Verification, verify
from megatron_growth.config import BaseConfig, ExperimentConfig, GrowthConfig, load_config
from megatron_growth.errors import ConfigError, GrowthError
from megatron_growth.planning.keys import KeyForm
from megatron_growth.planning.plan import GrowthPlan
from megatron_growth.quiet import quiet
from megatron_growth.report.growth import growth_report
from megatron_growth.report.inspection import (
    checkpoint_directory,
    inspect_checkpoint,
    known_tensors,
)
from megatron_growth.report.plot import check_path, plot_scales
from megatron_growth.report.tables import print_growth, print_inspection
from megatron_growth.report.verification import print_verification, verification_document

if TYPE_CHECKING:
    from megatron_growth.training.forward import Forward

app = typer.Typer(
    help="Grow a Mixture-of-Experts checkpoint while Megatron loads it, and train on.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, and exit."""
    try:
        app(None if argv is None else list(argv), prog_name="megatron-growth")
    except GrowthError as error:
        message = " ".join(str(error).splitlines())
        print(f"megatron-growth: error: {message}", file=sys.stderr)
        sys.exit(2)


@app.command()
def plan(
    config: Annotated[
        Path | None, typer.Argument(help="Growth configuration, a YAML file.", show_default=False)
    ] = None,
    load: Annotated[
        Path | None, typer.Option(help="Base checkpoint directory, instead of the file's.")
    ] = None,
    from_manifest: Annotated[
        Path | None, typer.Option(help="A grown run's directory: make its plan again, and compare.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what growth would make of a base checkpoint; reads no weights and writes nothing."""
    experiment, expected = _experiment(config, from_manifest)
    with quiet():
        weights_only = experiment.growth.optimizer == "reset"
        directory = _base_directory(experiment.base, load, config or from_manifest)
        source = SourceCheckpoint(directory, weights_only=weights_only)
        made = plan_for(source, experiment.growth, _recorded_form(from_manifest))
        _check_same(made, expected)
        arguments = _target_arguments(made, source.args)
        report = growth_report(source, experiment.growth, made, arguments)
    if as_json:
        _print_json(report.document())
    else:
        print_growth(Console(), report)


@app.command("inspect")
def inspect_command(
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
        _print_json(inspection.document())
    else:
        print_inspection(Console(), inspection)


@app.command("verify")
def verify_command(
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
        _print_json(verification_document(result, both))
    else:
        print_verification(Console(), result, both)
    if not result.passed or (both and not both.passed):
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything it makes.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps, to see that it runs.")
    ] = False,
) -> None:
    """Train a tiny base, grow it, and train on, without a GPU."""
    from megatron_growth.demo import run  # brings Megatron in

    run(out, quick)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"megatron-growth {version('megatron-growth')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """What stands before the command."""


# -- what the commands share
# ---------------------------------------------------------------------------------


def _experiment(
    config: Path | None, from_manifest: Path | None
) -> tuple[ExperimentConfig, str | None]:
    """What is to be planned, and the fingerprint that the plan must have."""
    if (config is None) == (from_manifest is None):
        raise ConfigError("give a growth configuration or --from-manifest DIR, one of the two")
    if config is not None:
        return load_config(config), None
    assert from_manifest is not None
    recorded = manifest.read(from_manifest)
    if recorded is None:
        raise ConfigError(
            f"{str(from_manifest)!r} holds no {manifest.MANIFEST}; give the directory of a grown "
            "run"
        )
    base = {"load": recorded["base"], "iteration": manifest.base_iteration(recorded)}
    return ExperimentConfig.model_validate({"base": base, "growth": recorded["growth"]}), recorded[
        "plan_fingerprint"
    ]


def _recorded_form(from_manifest: Path | None) -> KeyForm | None:
    """The key form of the grown run, which followed its command line."""
    recorded = manifest.read(from_manifest) if from_manifest else None
    return recorded["plan"]["target"]["key_form"] if recorded else None


def _check_same(made: GrowthPlan, expected: str | None) -> None:
    if expected is not None and made.fingerprint != expected:
        raise ConfigError(
            f"the plan made now has fingerprint {made.fingerprint[:16]}, the recorded one "
            f"{expected[:16]}: the base "
            "or megatron_growth has changed since; use the base and the versions that the manifest "
            "names"
        )


def _base_directory(base: BaseConfig, load: Path | None, config: Path | None) -> Path:
    directory = load or base.load
    if directory is None:
        raise ConfigError(f"{config} names no base checkpoint; set base.load in it or give --load")
    return iteration_directory(directory, base.iteration)


def _target_arguments(made: GrowthPlan, base_args: Namespace | None) -> list[str] | None:
    if base_args is None:
        return None
    from megatron_growth.training.arguments import target_arguments  # brings Megatron in

    return target_arguments(made, base_args)


def _measured(source: SourceCheckpoint) -> tuple[LayerScale, ...]:
    """Weight scales, with a progress bar where someone watches."""
    tensors = known_tensors(source)
    console = Console(stderr=True)
    columns = TextColumn("reading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=scale_bytes(tensors))
        return weight_scales(source, tensors, lambda nbytes: progress.advance(task, nbytes))


def _verified(base: Path, grown: Path | None, growth: GrowthConfig | None) -> Verification:
    """The verification, with a progress bar where someone watches."""
    console = Console(stderr=True)
    columns = TextColumn("comparing"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=None)
        show = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
        return verify(base, grown, growth=growth, on_progress=show)


def _forward(base: Path, grown: Path | None, config: Path | None) -> "Forward":
    """Base and grown model on the same text, each in a process of its own."""
    from megatron_growth.training.forward import compare  # brings Megatron in

    base, grown = (
        path and (path if (path / TRACKER).exists() else path.parent) for path in (base, grown)
    )
    if config is not None:
        growth = load_config(config).growth
        weights_only = growth.optimizer == "reset"
        plan = plan_for(
            SourceCheckpoint(iteration_directory(base), weights_only=weights_only), growth
        )
    else:
        plan = GrowthPlan.from_json(json.dumps((manifest.read(grown) or {})["plan"]))
    return compare(base, plan, grown=grown, config=config)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))
