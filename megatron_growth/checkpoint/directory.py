"""Megatron's checkpoint directories: which `iter_*` is meant, and whether its format can be grown.
What cannot is refused by name, with the remedy."""

import json
from pathlib import Path

from megatron_growth.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"

# What a directory of another format holds, and what to do about it.
_FOREIGN = (
    ("mp_rank_*", "the legacy `torch` format", "save it with --ckpt-format torch_dist"),
    ("modelopt_run_config.yaml", "a ModelOpt checkpoint", "save it with --ckpt-format torch_dist"),
)


def iteration_directory(load: str | Path, iteration: int | str = "latest") -> Path:
    """The `iter_*` directory of one iteration of a Megatron checkpoint directory.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    load = Path(load)
    if not load.is_dir():
        raise CheckpointError(
            f"checkpoint directory {str(load)!r} does not exist; give the one that holds {TRACKER}"
        )
    if iteration == "latest":
        tracker = load / TRACKER
        if not tracker.is_file():
            inside = (load / ".metadata").exists()
            hint = "give its parent directory" if inside else "training has saved nothing there yet"
            raise CheckpointError(f"checkpoint directory {str(load)!r} has no {TRACKER}; {hint}")
        word = tracker.read_text().strip()
        name = "release" if word == "release" else _iteration_name(word, tracker)
    elif iteration == "release":
        name = "release"
    else:
        name = f"iter_{int(iteration):07d}"
    directory = load / name
    if not directory.is_dir():
        found = [*sorted(load.glob("iter_*")), *load.glob("release")]
        have = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"checkpoint {str(directory)!r} does not exist; iterations there: {have}"
        )
    return directory


def _iteration_name(word: str, tracker: Path) -> str:
    if not word.isdigit():
        raise CheckpointError(
            f"{str(tracker)!r} holds {word!r}, not an iteration; write the iteration's number in it"
        )
    return f"iter_{int(word):07d}"


def check_format(directory: Path) -> None:
    """Refuse what is no whole `torch_dist` checkpoint, by name and with the remedy."""
    if not directory.is_dir():
        raise CheckpointError(
            f"checkpoint {str(directory)!r} does not exist; give an iter_* directory"
        )
    for pattern, what, remedy in _FOREIGN:
        if any(directory.glob(pattern)):
            raise CheckpointError(
                f"checkpoint {str(directory)!r} is {what}, which cannot be grown; {remedy}"
            )
    config = directory / "metadata.json"
    if config.is_file():
        backend = _backend(config)
        if backend != "torch_dist":
            raise CheckpointError(
                f"checkpoint {str(directory)!r} is of format {backend!r}, which cannot be grown; "
                "save it with --ckpt-format torch_dist"
            )
    if not (directory / ".metadata").is_file():
        hint = (
            f"; give one of its iter_* directories, named in {TRACKER}"
            if (directory / TRACKER).exists()
            else ""
        )
        raise CheckpointError(
            f"checkpoint {str(directory)!r} has no .metadata: it is no torch_dist checkpoint, or "
            "its save did not finish"
            + (hint or "; use another iteration, or save it with --ckpt-format torch_dist")
        )


def _backend(config: Path) -> str:
    try:
        return str(json.loads(config.read_text())["sharded_backend"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{str(config)!r} is damaged; restore it from another copy of the checkpoint"
        ) from None
