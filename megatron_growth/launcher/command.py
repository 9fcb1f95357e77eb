"""The commands of this folder; `register` adds them to `megatron-growth`."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from megatron_growth.launcher.chain import Link, chain
from megatron_growth.launcher.experiment import Experiment, load_experiment, stage_named
from megatron_growth.launcher.json_schema import experiment_schema
from megatron_growth.launcher.render import File, Target, stage_files
from megatron_growth.quiet import quiet

ExperimentFile = Annotated[Path, typer.Argument(help="Experiment, a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="PATH=VALUE, as in stages[1].nodes=4; may be repeated."),
]
Profile = Annotated[
    Path | None, typer.Option(help="Cluster profile, a YAML file, instead of the experiment's.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("launch")(launch)
    app.command("schema")(schema)


def launch(
    experiment: ExperimentFile,
    target: Annotated[Target, typer.Option(help="What the files are for.")],
    stage: Annotated[str | None, typer.Option(help="This stage alone.")] = None,
    settings: Settings = None,
    cluster: Profile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print all files, and write none.")
    ] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Start the stages as well.")] = False,
) -> None:
    """Write what torchrun, SLURM or Kubernetes needs to run an experiment's stages, and start
    them."""
    console, workdir = Console(highlight=False), Path.cwd()
    loaded = load_experiment(experiment, settings or (), cluster)
    links = chain(loaded)
    if stage is not None:
        stage_named(loaded, stage)
    with quiet():
        from megatron_growth.launcher.flags import check_flags  # brings torch in

        check_flags(loaded, links)
    chosen = [link for link in links if stage in (None, link.stage.name)]
    files = [_resolved(loaded, workdir), *_files(loaded, chosen, target, workdir)]
    for file in files:
        if dry_run:
            console.rule(str(file.path.relative_to(workdir)), align="left")
            print(file.text)
        else:
            _write(file)
    if dry_run:
        return
    console.print(f"{len(files)} files written below {loaded.directory}")
    if submit:
        from megatron_growth.launcher.submit import submit as start

        for line in start(loaded, chosen, target, workdir):
            console.print(line)


def schema() -> None:
    """Print the JSON schema of experiment files, for editors."""
    print(json.dumps(experiment_schema(), indent=2))


def _files(experiment: Experiment, links: list[Link], target: Target, workdir: Path) -> list[File]:
    return [file for link in links for file in stage_files(experiment, link, target, workdir)]


def _resolved(experiment: Experiment, workdir: Path) -> File:
    """The experiment as it was launched, every extended file and default in it."""
    content = experiment.model_dump(mode="json", by_alias=True, exclude_none=True)
    head = f"# As launched by megatron-growth {version('megatron-growth')}.\n"
    text = head + yaml.safe_dump(content, sort_keys=False)
    return File(workdir / experiment.directory / "experiment.yaml", text)


def _write(file: File) -> None:
    file.path.parent.mkdir(parents=True, exist_ok=True)
    file.path.write_text(file.text, encoding="utf-8")
