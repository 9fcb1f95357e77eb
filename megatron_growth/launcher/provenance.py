"""What a stage ran with, beside what it ran: `env.json` and `git.json`, written at launch.

A secret is there by name. A commit is that of the machine that launches; an image has its own.
"""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron_growth
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.cluster import Cluster
from megatron_growth.launcher.environment import environment

ENVIRONMENT = "env.json"
GIT = "git.json"


def environment_file(link: Link, cluster: Cluster) -> str:
    """`env.json`: every variable that the stage's scripts set, and the secrets they ask for."""
    return _json({"environment": environment(link, cluster), "secrets": cluster.secrets})


def git_file(workdir: Path) -> str:
    """`git.json`: the commits of this package and of the directory that is launched from."""
    package = Path(megatron_growth.__file__).parent
    own = {"version": version("megatron-growth")}
    return _json(
        {"megatron_growth": own | _commit(package, "__init__.py"), "workdir": _commit(workdir)}
    )


def _commit(directory: Path, *tracked: str) -> dict[str, Any]:
    """The commit that is checked out, and whether a tracked file differs from it; null where there
    is no repository, or one that does not have the file: a package installed below another."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None or _git(directory, "ls-files", "--error-unmatch", *tracked) is None:
        return {"commit": None, "dirty": None}
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changed)}


def _git(directory: Path, *words: str) -> str | None:
    """What git says; None where it fails, or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *words], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
