"""Does a container have the directories that its processes use?

What no mount of Pyxis and no claim of Kubernetes covers is not there inside, and a job would find
out on nodes that are paid for. Scripts name the working directory and `runs` by the path they have
outside, so those lie at the same one inside; what only the training reads (data, tokenizer, base)
may be mounted anywhere, and is named by its path inside.

Links are not followed: where they lead to inside is the container's.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_growth.errors import ConfigError
from megatron_growth.launcher.experiment import Experiment


@dataclass(frozen=True)
class _Used:
    """A directory that processes use.

    Attributes:
        where: what says it, for errors; for the working directory what should cover it.
        path: it, absolute.
        what: said after the path in errors.
        outside: it is used outside as well.
        written: training writes there.
    """

    where: str
    path: Path
    what: str = ""
    outside: bool = False
    written: bool = False

    @property
    def remedy(self) -> str:
        return "launch from one that is" if self.what else "name one that is"


def check_mounts(experiment: Experiment, workdir: Path) -> None:
    """For SLURM: the container, if there is one, has every directory.

    Raises:
        ConfigError: it does not.
    """
    container = experiment.cluster.container
    if container is None or container.mounts is None:
        return
    mounts = [_sides(pair, workdir) for entry in container.mounts for pair in entry.split(",")]
    for used in _used(experiment, workdir, "cluster.container.mounts"):
        path = str(used.path)
        covering = [mount for mount in mounts if used.path.is_relative_to(mount[1])]
        if not covering:
            raise ConfigError(
                f"{used.where}: the container would not have {path!r}{used.what}, which is in none "
                f"of the mounts {container.mounts}; add {f'{path}:{path}'!r} to "
                f"cluster.container.mounts, or a directory above it, or {used.remedy}"
            )
        outside, inside, flags = covering[-1]  # enroot mounts in this order, one over the other
        if used.outside and outside != inside:
            raise ConfigError(
                f"{used.where}: {path!r}{used.what} would be another directory in the container, "
                f"where {str(inside)!r} is {str(outside)!r}, and the scripts use one path on both "
                f"sides; put {f'{path}:{path}'!r} at the end of cluster.container.mounts, or "
                f"{used.remedy} at the same path"
            )
        if used.written and "ro" in flags:
            raise ConfigError(
                f"{used.where}: {path!r} would be read-only in the container, by the mount of "
                f"{str(inside)!r}, and training writes there; take `ro` from it in "
                f"cluster.container.mounts, or {used.remedy} and can be written"
            )


def check_claims(experiment: Experiment, workdir: Path) -> None:
    """For Kubernetes: every directory is on a claim.

    Raises:
        ConfigError: there is no claim, or one is on none.
    """
    claims = experiment.cluster.kubernetes.claims
    if not claims:
        raise ConfigError(
            f"cluster.kubernetes.claims: there are none, and pods would not have {str(workdir)!r}, "
            "the directory launched from; name the volume that it is on, as in "
            "`[{name: shared, path: /shared}]`"
        )
    paths = [_absolute(claim.path, workdir) for claim in claims]
    for used in _used(experiment, workdir, "cluster.kubernetes.claims"):
        if not any(used.path.is_relative_to(path) for path in paths):
            raise ConfigError(
                f"{used.where}: pods would not have {str(used.path)!r}{used.what}, which is on "
                f"none of the claims, at {', '.join(map(str, paths))}; add the volume that it is "
                f"on to cluster.kubernetes.claims, or {used.remedy}"
            )


def _used(experiment: Experiment, workdir: Path, covers: str) -> Iterator[_Used]:
    data, base = experiment.data, experiment.base
    yield _Used(covers, _absolute(workdir, workdir), ", the directory launched from", True)
    yield _Used("runs", _absolute(experiment.runs, workdir), outside=True, written=True)
    if data.cache is not None:
        yield _Used("data.cache", _absolute(data.cache, workdir), written=True)
    if base is not None and base.load is not None:
        yield _Used("base.load", _absolute(base.load, workdir))
    for field, parts in (("train", data.train), ("valid", data.valid)):
        for index, part in enumerate(parts):
            # A prefix of files. Of a weight it is the working directory, which was looked at.
            yield _Used(f"data.{field}[{index}]", _absolute(str(part), workdir).parent)
    # One that is not here is a name that Hugging Face knows.
    if data.tokenizer_model and (workdir / data.tokenizer_model).exists():
        yield _Used("data.tokenizer_model", _absolute(data.tokenizer_model, workdir))


def _sides(mount: str, workdir: Path) -> tuple[Path, Path, list[str]]:
    """`/data:/lustre/data:ro+x-create=dir`: outside, inside and flags; a path alone is both."""
    outside, *rest = mount.split(":")
    flags = rest[1].split("+") if len(rest) > 1 else []
    inside = rest[0] if rest else outside
    return _absolute(outside, workdir), _absolute(inside, workdir), flags


def _absolute(path: str | Path, workdir: Path) -> Path:
    """Without `..`, which would seem to lie in what it leads out of."""
    return Path(os.path.normpath(workdir / path))
