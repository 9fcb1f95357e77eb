"""`events.jsonl`: what happened to a stage, a line each, as its scripts write it."""

import json
from pathlib import Path
from typing import Any


def read_events(directory: Path) -> list[dict[str, Any]]:
    """A stage's events, the latest last."""
    path = directory / "events.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [event for line in lines if (event := _event(line))]


def _event(line: str) -> dict[str, Any] | None:
    """None for a line that was cut short: its writer was killed, or its disk was full."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "event" in found else None
