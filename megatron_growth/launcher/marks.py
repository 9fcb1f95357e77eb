"""How far a stage is, by what it leaves in its directory: DONE, and its checkpoints' tracker."""

from pathlib import Path

from megatron_growth.checkpoint.directory import TRACKER
from megatron_growth.launcher.chain import CHECKPOINTS


def is_done(directory: Path) -> bool:
    """Whether it has reached its last iteration."""
    return (directory / "DONE").exists()


def saved_iteration(directory: Path) -> int | None:
    """Iteration of its last checkpoint, None where it has none."""
    tracker = directory / CHECKPOINTS / TRACKER
    text = tracker.read_text(encoding="utf-8").strip() if tracker.exists() else ""
    return int(text) if text.isdigit() else None
