"""Places in a file: the keys and the places in lists that lead there, `stages[1].growth.width`."""

from collections.abc import Sequence
from typing import Any

Step = str | int


def shown_path(location: Sequence[Step]) -> str:
    """`stages[1].growth.width`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def leads(value: Any, step: Step) -> bool:
    """Whether there is something one step on."""
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value
