"""A stage as files for a target; nothing is written here.

Below `runs/<experiment>/<stage>/`:

    growth.yaml     a stage with a base: the growth file, as `plan`, `verify` and `pretrain` take it
    process.sh      what each process runs: environment and Megatron's command line
    job.sh          slurm: the job; alert.sh beside it where the cluster has an alert
    node.sh         torchrun, k8s: one node's share
    trainjob.yaml   k8s

The templates are in `launch/`, at the top of the repository and, by a link, in the package.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_growth.config import ContinueConfig, GrowthFile
from megatron_growth.errors import ConfigError
from megatron_growth.launcher.arguments import GROWTH_FILE, stage_arguments
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.environment import environment, modules
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.kubernetes import job_name
from megatron_growth.launcher.mounts import check_claims, check_mounts

TEMPLATES = Path(__file__).with_name("templates")
SECONDS_FOR_A_STEP = 60  # a signal is seen between two steps
_LONGEST_JOB = 50  # a pod is called NAME-node-0-INDEX, and 63 characters is all it has
BYTES_OF_A_PARAMETER = 14  # bf16 weight, fp32 master and both moments


class Target(StrEnum):
    """Where stages are launched."""

    TORCHRUN = "torchrun"
    SLURM = "slurm"
    K8S = "k8s"


@dataclass(frozen=True)
class File:
    """A file to be written."""

    path: Path
    text: str


def stage_files(experiment: Experiment, link: Link, target: Target, workdir: Path) -> list[File]:
    """All files of a stage.

    Args:
        experiment: it all.
        link: the stage.
        target: what they are for.
        workdir: directory that the relative paths of the experiment start from.

    Raises:
        ConfigError: the target cannot run this stage.
    """
    directory = workdir / link.directory
    if target is Target.SLURM:
        _check_plain(workdir)
        _check_plain(directory)
        check_mounts(experiment, workdir)
    values = _values(experiment, link, target, workdir)
    files = [File(directory / name, _render(name, values)) for name in _names(experiment, target)]
    if link.growth is not None:
        files.append(File(directory / GROWTH_FILE, growth_file(link)))
    return files


# What `#SBATCH --output=` would end at, or take for something else: `%j` is the job.
_NOT_IN_A_DIRECTIVE = re.compile(r"""[\s"'\\#%]""")


def _check_plain(directory: Path) -> None:
    found = _NOT_IN_A_DIRECTIVE.search(str(directory))
    if found:
        raise ConfigError(
            f"the directory {str(directory)!r} has {found[0]!r} in it, which an #SBATCH line "
            "cannot say; launch from another, or set `runs` to one without"
        )


def growth_file(link: Link) -> str:
    """The growth file of a stage that has a base."""
    assert link.growth is not None
    assert link.parent is not None
    config = GrowthFile.model_validate(
        {"base": link.parent, "growth": link.growth, "continue": _continue(link)}
    )
    content = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    head = f"# How stage {link.stage.name!r} starts. Written by `megatron-growth launch`.\n"
    return head + yaml.safe_dump(content, sort_keys=False)


def _continue(link: Link) -> ContinueConfig:
    """A new schedule that decays does so over the stage; Megatron would decay to `--train-iters`,
    which counts the stages before as well."""
    settings = link.stage.continue_
    rate = settings.learning_rate
    if rate == "keep" or rate.decay_style == "constant" or rate.decay_iters is not None:
        return settings
    whole = rate.model_copy(update={"decay_iters": link.last - link.first})
    return settings.model_copy(update={"learning_rate": whole})


def _names(experiment: Experiment, target: Target) -> Iterator[str]:
    yield "process.sh"
    if target is Target.SLURM:
        yield "job.sh"
        if experiment.cluster.slurm.alert:
            yield "alert.sh"
    else:
        yield "node.sh"
    if target is Target.K8S:
        yield "trainjob.yaml"


def _render(name: str, values: Mapping[str, Any]) -> str:
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell and YAML: what may need it goes through `quote` or `tojson`
    )
    templates.filters["quote"] = lambda value: shlex.quote(str(value))
    return templates.get_template(f"{name}.j2").render(values)


def _values(experiment: Experiment, link: Link, target: Target, workdir: Path) -> dict[str, Any]:
    cluster, stage = experiment.cluster, link.stage
    walltime = cluster.slurm.minutes if target is Target.SLURM else None
    words = stage_arguments(experiment, link, walltime=walltime)
    values: dict[str, Any] = {
        "title": f"Stage {stage.name!r} of {experiment.name!r}",
        "experiment": experiment.name,
        "name": stage.name,
        "job_name": job_name(experiment, link),
        "target": target.value,
        "workdir": str(workdir),
        "directory": str(workdir / link.directory),
        "checkpoints": str(workdir / link.checkpoints),
        "parent": _parent(experiment, link, workdir),
        "last": link.last,
        "module": "megatron_growth.pretrain" if link.growth else "megatron_growth.train",
        "arguments": option_lines(words),
        "environment": environment(link, cluster),
        "nodes": stage.nodes,
        "processes_per_node": cluster.processes_per_node,
        "per_process": target is Target.SLURM and cluster.slurm.tasks == "per_process",
        "python": cluster.python or (sys.executable if target is Target.TORCHRUN else "python"),
        "save_seconds": cluster.save_seconds,
        "signal_seconds": cluster.save_seconds + SECONDS_FOR_A_STEP,
        "checkpoint_bytes": link.parameters.total * BYTES_OF_A_PARAMETER,
        "preflight": cluster.preflight,
        "modules": modules(experiment, link),
        "growth_file": str(workdir / link.directory / GROWTH_FILE) if link.growth else "",
        "secrets": cluster.secrets,
        "container": cluster.container,
        "slurm": cluster.slurm,
    }
    return values | (_kubernetes(experiment, link, workdir) if target is Target.K8S else {})


def option_lines(words: list[str]) -> list[str]:
    """One option and its values a line, quoted for a shell."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append(_quoted(word))
        else:
            lines[-1] += f" {_quoted(word)}"
    return lines


def _quoted(word: str) -> str:
    """For an array of bash; a bare comma there looks like a mistake, to shellcheck too."""
    return f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word)


def _parent(experiment: Experiment, link: Link, workdir: Path) -> str:
    """The stage whose DONE is waited for; none for a base that is there already."""
    if link.parent is None or link.outside:
        return ""
    assert link.parent.load is not None
    return str(workdir / link.parent.load.parent)


def _kubernetes(experiment: Experiment, link: Link, workdir: Path) -> dict[str, Any]:
    cluster = experiment.cluster
    if cluster.container is None:
        raise ConfigError("cluster.container: Kubernetes runs nothing without an image; give one")
    if cluster.secrets and cluster.kubernetes.secret is None:
        raise ConfigError(
            f"cluster.secrets {cluster.secrets}: no Secret holds them; name it in "
            "cluster.kubernetes.secret"
        )
    name = job_name(experiment, link)
    if not name[0].isalpha():
        raise ConfigError(
            f"name {experiment.name!r}: Kubernetes' names begin with a letter, and the TrainJob's "
            f"would be {name!r}; name the experiment otherwise"
        )
    if len(name) > _LONGEST_JOB:
        raise ConfigError(
            f"the TrainJob's name {name!r} has {len(name)} characters, and those of its pods leave "
            f"room for {_LONGEST_JOB}; shorten the experiment's or the stage's"
        )
    check_claims(experiment, workdir)
    gpus = {"nvidia.com/gpu": cluster.processes_per_node} if cluster.device == "h100" else {}
    resources = gpus | dict(cluster.kubernetes.resources)
    return {"kubernetes": cluster.kubernetes, "resources": resources}
