"""The `megatron-growth` command: `plan` growth, `grow` to disk, `inspect` and `verify` checkpoints,
run the `demo`.

A skin over the library: each command is a few lines. `plan`, `inspect` and `verify` only read;
`grow` writes a checkpoint; growing while Megatron loads is `python -m megatron_growth.pretrain`.
Exit codes: 0 done, 1 not verified, 2 for the user to put right.
"""

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint.directory import TRACKER, iteration_directory
from megatron_growth.checkpoint.norms import LayerScale, scale_bytes, weight_scales
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.checkpoint.verify import Verification, verify
from megatron_growth.checkpoint.write import Crew, Draft, Mode, Written, grow
from megatron_growth.config import BaseConfig, GrowthConfig, GrowthFile, load_config
from megatron_growth.errors import ConfigError, GrowthError
from megatron_growth.launcher import command as launcher
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
from megatron_growth.report.writing import Outlook, document, print_outlook, print_written

if TYPE_CHECKING:
    from megatron_growth.training.forward import Forward

_SECONDS_FOR_RANK_0 = 2
_UsageError: Any = typer.BadParameter.__base__  # of whichever click typer brings along

app = typer.Typer(
    help="Grow a Mixture-of-Experts checkpoint while Megatron loads it, and train on.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change the configuration, or say it all: --set growth.width.factor=2. Repeatable.",
        show_default=False,
    ),
]
launcher.register(app)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, and exit. Of a torchrun's ranks, which fail together, the first speaks,
    and the launcher must not end it before."""
    words = None if argv is None else list(argv)
    try:
        sys.exit(app(words, prog_name="megatron-growth", standalone_mode=False) or 0)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        _fail(f"{error.format_message()} (--help says more)")
    except GrowthError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename!r}: {error.strerror}; see that it is there and may be used")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        line = " ".join(message.splitlines())
        print(f"megatron-growth: error: {line}", file=sys.stderr, flush=True)
    else:
        time.sleep(_SECONDS_FOR_RANK_0)
    sys.exit(2)


@app.command()
def plan(
    config: Annotated[
        Path | None,
        typer.Argument(help="Growth configuration or experiment, a YAML file.", show_default=False),
    ] = None,
    load: Annotated[
        Path | None, typer.Option(help="Base checkpoint directory, instead of the file's.")
    ] = None,
    from_manifest: Annotated[
        Path | None, typer.Option(help="A grown run's directory: make its plan again, and compare.")
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show what growth would make of a base checkpoint, or what an experiment costs and whether it
    fits; reads no weights and writes nothing."""
    if config and not (load or from_manifest) and launcher.is_experiment(config):
        launcher.plan_experiment(config, settings, as_json)
        return
    file, expected = _growth_file(config, settings, from_manifest)
    with quiet():
        weights_only = file.growth.optimizer == "reset"
        directory = _base_directory(file.base, load, config or from_manifest)
        source = SourceCheckpoint(directory, weights_only=weights_only)
        made = plan_for(source, file.growth, _recorded_form(from_manifest))
        _check_same(made, expected)
        arguments = _target_arguments(made, source.args)
        report = growth_report(source, file.growth, made, arguments)
    if as_json:
        _print_json(report.document())
    else:
        print_growth(Console(), report)


@app.command("grow")
def grow_command(
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
        _print_json(document(result))
    elif isinstance(result, Outlook):
        print_outlook(Console(), result)
    else:
        print_written(Console(), result)


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


def _growth_file(
    config: Path | None, settings: Sequence[str] | None, from_manifest: Path | None
) -> tuple[GrowthFile, str | None]:
    """What is to be planned, and the fingerprint that the plan must have."""
    if (config or settings) and from_manifest:
        raise ConfigError(
            "--from-manifest says all of the growth; leave the configuration and --set out"
        )
    if from_manifest is None:
        return _configured(config, settings), None
    recorded = manifest.read(from_manifest)
    if recorded is None:
        raise ConfigError(
            f"{str(from_manifest)!r} holds no {manifest.MANIFEST}; give the directory of a grown "
            "run"
        )
    base = {"load": recorded["base"], "iteration": manifest.base_iteration(recorded)}
    return GrowthFile.model_validate({"base": base, "growth": recorded["growth"]}), recorded[
        "plan_fingerprint"
    ]


def _configured(config: Path | None, settings: Sequence[str] | None) -> GrowthFile:
    if config is None and not settings:
        raise ConfigError(
            "nothing says how to grow; give a configuration file, or --set growth.depth.factor=2 "
            "and the like"
        )
    return load_config(config, settings or ())


def _draft(
    config: Path | None, settings: Sequence[str] | None, load: Path | None, mode: Mode
) -> Draft:
    file = _configured(config, settings)
    given = load or file.base.load
    directory = _base_directory(file.base, load, config)
    return Draft(directory, file.growth, mode, given, file.continue_)


def _written(draft: Draft, save: Path, crew: Crew, resume: bool, checksum: bool) -> Written | None:
    """The growth, with a progress bar where someone watches."""
    with _bar("writing", DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as show:
        return grow(draft, save, crew=crew, resume=resume, checksum=checksum, on_progress=show)


@contextmanager
def _bar(name: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; what it gives takes bytes done and in
    all."""
    console = Console(stderr=True)
    with Progress(
        TextColumn(name), BarColumn(), *columns,
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


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
        raise ConfigError(
            f"{config or '--set'} names no base checkpoint; set base.load in it or give --load"
        )
    return iteration_directory(directory, base.iteration)


def _target_arguments(made: GrowthPlan, base_args: Namespace | None) -> list[str] | None:
    if base_args is None:
        return None
    from megatron_growth.training.arguments import target_arguments  # brings Megatron in

    return target_arguments(made, base_args)


def _measured(source: SourceCheckpoint) -> tuple[LayerScale, ...]:
    """Weight scales."""
    tensors = known_tensors(source)
    total, done = scale_bytes(tensors), 0

    with _bar("reading weights", DownloadColumn(), TransferSpeedColumn()) as show:

        def more(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            show(done, total)

        return weight_scales(source, tensors, more)


def _verified(base: Path, grown: Path | None, growth: GrowthConfig | None) -> Verification:
    with _bar("comparing", DownloadColumn(), TransferSpeedColumn()) as show:
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
