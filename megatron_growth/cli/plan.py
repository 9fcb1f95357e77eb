"""`megatron-growth plan`: what growth would make of a base, or what an experiment costs."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.cli.experiments import is_experiment, plan_experiment
from megatron_growth.cli.shared import (
    AsJson,
    Profile,
    Settings,
    base_directory,
    configured,
    print_json,
)
from megatron_growth.config import GrowthFile
from megatron_growth.errors import ConfigError
from megatron_growth.planning.keys import KeyForm
from megatron_growth.planning.plan import GrowthPlan
from megatron_growth.quiet import quiet
from megatron_growth.report.growth import growth_report
from megatron_growth.report.tables import print_growth


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
    cluster: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Show what growth would make of a base checkpoint, or what an experiment costs and whether it
    fits; reads no weights and writes nothing."""
    if config and not (load or from_manifest) and is_experiment(config):
        plan_experiment(config, settings, cluster, as_json)
        return
    if cluster:
        raise ConfigError(
            f"--cluster {str(cluster)!r} says nothing about growth alone; leave it out, or give an "
            "experiment"
        )
    file, expected = _growth_file(config, settings, from_manifest)
    with quiet():
        weights_only = file.growth.optimizer == "reset"
        directory = base_directory(file.base, load, config or from_manifest)
        source = SourceCheckpoint(directory, weights_only=weights_only)
        made = plan_for(source, file.growth, _recorded_form(from_manifest))
        _check_same(made, expected)
        arguments = _target_arguments(made, source.args)
        report = growth_report(source, file.growth, made, arguments)
    if as_json:
        print_json(report.document())
    else:
        print_growth(Console(), report)


def _growth_file(
    config: Path | None, settings: Sequence[str] | None, from_manifest: Path | None
) -> tuple[GrowthFile, str | None]:
    """What is to be planned, and the fingerprint that the plan must have."""
    if (config or settings) and from_manifest:
        raise ConfigError(
            "--from-manifest says all of the growth; leave the configuration and --set out"
        )
    if from_manifest is None:
        return configured(config, settings), None
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


def _target_arguments(made: GrowthPlan, base_args: Namespace | None) -> list[str] | None:
    if base_args is None:
        return None
    from megatron_growth.training.arguments import target_arguments  # brings Megatron in

    return target_arguments(made, base_args)
