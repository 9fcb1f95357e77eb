"""Writing a launch's files: each whole or not at all, and what an earlier launch said is kept."""

from collections.abc import Iterable
from itertools import count

from megatron_growth.launcher.launched import RESOLVED
from megatron_growth.launcher.provenance import ENVIRONMENT, GIT
from megatron_growth.launcher.render import File

# One that would change becomes experiment-1.yaml and so on.
_KEPT = (RESOLVED, ENVIRONMENT, GIT)


def write_files(files: Iterable[File]) -> None:
    """Write them, and make the directories that jobs open their logs in."""
    for file in files:
        directory = file.path.parent
        directory.mkdir(parents=True, exist_ok=True)
        if file.path.name == "process.sh":
            (directory / "ranks").mkdir(exist_ok=True)
        if file.path.name == "job.sh":
            (directory / "slurm").mkdir(exist_ok=True)
        if file.path.name in _KEPT:
            _keep(file)
        # A shell reads its script while it runs: never under its eyes.
        new = file.path.with_name(f".{file.path.name}.new")
        new.write_text(file.text, encoding="utf-8")
        new.replace(file.path)


def _keep(file: File) -> None:
    path = file.path
    if not path.exists() or path.read_text(encoding="utf-8") == file.text:
        return
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
    path.rename(next(name for name in names if not name.exists()))
