"""What is under way, for someone who watches: a line for each phase, a bar for each run."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console


class Progress:
    """The phases so far and the time they took.

    Attributes:
        seconds: of each phase and in all, by the clock and of the processors.
    """

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self._console = console

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        """Say what begins, and how long it took."""
        self._console.print(f"{name}: {title}")
        clock, processors = time.monotonic(), _processor_seconds()
        yield
        wall, cpu = time.monotonic() - clock, _processor_seconds() - processors
        total = self.seconds.pop("total", {"wall": 0.0, "cpu": 0.0})
        self.seconds[name] = {"wall": round(wall, 1), "cpu": round(cpu, 1)}
        self.seconds["total"] = {
            kind: round(total[kind] + taken, 1) for kind, taken in self.seconds[name].items()
        }
        self._console.print(f"  done in {wall:.0f} s")

    @contextmanager
    def steps(self, name: str, num_steps: int) -> Iterator[Callable[[int, float], None]]:
        """A bar while a run goes on, where someone watches; yields what moves it."""
        columns = (
            progress.TextColumn("  {task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[loss]}"),
            progress.TimeElapsedColumn(),
        )
        hidden = not self._console.is_terminal
        with progress.Progress(
            *columns, console=self._console, transient=True, disable=hidden
        ) as bar:
            task = bar.add_task(name, total=num_steps, loss="starting")
            yield lambda done, loss: bar.update(task, completed=done, loss=f"loss {loss:.3f}")


def _processor_seconds() -> float:
    """Of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
