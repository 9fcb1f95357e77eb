"""`megatron-growth launch`, `status` and `schema`, and what `plan` says of an experiment."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from megatron_growth import config
from megatron_growth.cli.shared import AsJson, Profile, Settings, print_json
from megatron_growth.errors import ConfigError
from megatron_growth.launcher import jobs
from megatron_growth.launcher.arguments import stage_arguments
from megatron_growth.launcher.base import check_base
from megatron_growth.launcher.budget import budget
from megatron_growth.launcher.budget_tables import print_budget
from megatron_growth.launcher.chain import Link, chain
from megatron_growth.launcher.experiment import Experiment, load_experiment, stage_named
from megatron_growth.launcher.extends import extended
from megatron_growth.launcher.files import write_files
from megatron_growth.launcher.json_schema import Kind, json_schema
from megatron_growth.launcher.launched import RESOLVED, check_unchanged
from megatron_growth.launcher.provenance import ENVIRONMENT, GIT, environment_file, git_file
from megatron_growth.launcher.render import File, Target, stage_files
from megatron_growth.launcher.status import stage_status
from megatron_growth.launcher.status_table import print_status
from megatron_growth.launcher.submit import check_idle, check_ready, job_of, live_stages, queues
from megatron_growth.launcher.submit import submit as start
from megatron_growth.quiet import quiet

ExperimentFile = Annotated[Path, typer.Argument(help="Experiment, a YAML file.")]


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
    if dry_run and submit:
        raise ConfigError("--dry-run starts nothing and --submit does; leave one of them out")
    loaded = load_experiment(experiment, settings or (), cluster)
    links = chain(loaded)
    if stage is not None:
        stage_named(loaded, stage)
    with quiet():
        check_base(loaded)
        from megatron_growth.launcher.flags import check_flags  # brings torch in

        check_flags(loaded, links)
    chosen = [link for link in links if stage in (None, link.stage.name)]
    files = [_resolved(loaded, links, workdir), *_files(loaded, chosen, target, workdir)]
    live = live_stages(loaded, links, workdir)
    check_unchanged(loaded, links, live, workdir)
    if dry_run:
        _show(console, files, workdir)
        return
    check_idle(chosen, live)
    if submit:
        check_ready(loaded, chosen, live, target, workdir)
    write_files(files)
    console.print(f"{len(files)} files written below {loaded.directory}")
    if submit:
        for line in start(loaded, chosen, target, workdir):
            console.print(line)


def _show(console: Console, files: list[File], workdir: Path) -> None:
    for file in files:
        below = file.path.is_relative_to(workdir)
        console.rule(str(file.path.relative_to(workdir) if below else file.path), align="left")
        print(file.text)


def status(
    experiment: ExperimentFile,
    settings: Settings = None,
    cluster: Profile = None,
    as_json: AsJson = False,
) -> None:
    """Show where an experiment's stages are: waiting, running, done, failed and why."""
    workdir = Path.cwd()
    loaded = load_experiment(experiment, settings or (), cluster)
    known = jobs.read(workdir / loaded.directory)
    asked = queues(known)
    stages = [
        stage_status(
            link, job_of(known.get(link.stage.name, {})), asked.get(link.stage.name, {}), workdir
        )
        for link in chain(loaded)
    ]
    if as_json:
        print_json([asdict(stage) for stage in stages])
    else:
        print_status(Console(highlight=False), loaded.name, stages)


def plan_experiment(
    path: Path, settings: list[str] | None, cluster: Path | None, as_json: bool
) -> None:
    """What an experiment costs, and whether it fits; exit code 1 if it will not run."""
    loaded = load_experiment(path, settings or (), cluster)
    with quiet():
        check_base(loaded)
    links = chain(loaded)
    for link in links:
        stage_arguments(loaded, link)  # refuses what is said twice
    stages = budget(loaded, links)
    if as_json:
        print_json([stage.document() for stage in stages])
    else:
        print_budget(Console(highlight=False), loaded.name, stages)
    if any(note.severity == "error" for stage in stages for note in stage.notes):
        raise typer.Exit(1)


def is_experiment(path: Path) -> bool:
    """Whether a file is an experiment rather than a growth file, which a missing one may be."""
    return path.is_file() and config.is_experiment(
        extended(path, "a `growth:` section, or `stages:`")
    )


def schema(
    of: Annotated[Kind, typer.Option(help="What the file is.")] = Kind.EXPERIMENT,
) -> None:
    """Print the JSON schema of experiments, or of another file that a user writes, for editors."""
    print_json(json_schema(of))


def _files(experiment: Experiment, links: list[Link], target: Target, workdir: Path) -> list[File]:
    git = git_file(workdir)
    files = []
    for link in links:
        directory = workdir / link.directory
        files += stage_files(experiment, link, target, workdir)
        files.append(File(directory / ENVIRONMENT, environment_file(link, experiment.cluster)))
        files.append(File(directory / GIT, git))
    return files


def _resolved(experiment: Experiment, links: list[Link], workdir: Path) -> File:
    """The experiment as it was launched, every extended file and default in it, and the number of
    the base's latest iteration."""
    if links[0].outside:
        experiment = experiment.model_copy(update={"base": links[0].parent})
    content = experiment.model_dump(mode="json", by_alias=True, exclude_none=True)
    head = f"# As launched by megatron-growth {version('megatron-growth')}.\n"
    text = head + yaml.safe_dump(content, sort_keys=False)
    return File(workdir / experiment.directory / RESOLVED, text)
