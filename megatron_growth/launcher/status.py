"""Where an experiment's stages are: waiting, running, done, failed and why.

Read from what the stages themselves leave behind (DONE, events.jsonl, the ranks' output) and, where
there is SLURM, from its queue. Nothing is asked of the processes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_growth.launcher.chain import Link

State = Literal["waiting", "running", "done", "failed"]

# [...] iteration  65/  100 | ... | elapsed time per iteration (ms): 472.2 | ... | lm loss: 2.75E+00
_ITERATION = re.compile(
    r"iteration +(?P<iteration>\d+)/ *\d+ \|.*?"
    r"elapsed time per iteration \(ms\): (?P<ms>[\d.]+) \|(.*? lm loss: (?P<loss>[\d.Ee+-]+))?"
)
# The line that says what went wrong: ours, SLURM's, or as in `[rank0]: RuntimeError: mismatch`.
_CAUSES = (
    re.compile(r"^(?:megatron_growth: error.*?|preflight|slurmstepd: error): (.*)$", re.MULTILINE),
    re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b.*)$", re.MULTILINE),
)
_FAILED = ("failed", "preflight-failed", "refused")
_TAIL = 256 << 10  # bytes of a log that are read


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        iteration: the last one in the log.
        loss: of that iteration; None where it was not printed.
        tokens_per_second: at that iteration's pace.
        seconds_left: to the last iteration, likewise.
    """

    iteration: int
    loss: float | None
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class StageStatus:
    """Where one stage is.

    Attributes:
        name: the stage.
        state: in a word.
        saved: iteration of its last checkpoint, None where it has none.
        last: the iteration it goes to.
        progress: from the log, None where it says nothing.
        why: what it waits for, or failed of.
    """

    name: str
    state: State
    saved: int | None
    last: int
    progress: Progress | None
    why: str


def stage_status(
    link: Link, job: str | None, queue: Mapping[str, str], workdir: Path
) -> StageStatus:
    """Where a stage is.

    Args:
        link: the stage.
        job: its SLURM job, None where it has none.
        queue: state of the jobs that SLURM still knows as waiting or running.
        workdir: directory that the relative paths of the experiment start from.
    """
    directory = workdir / link.directory
    state, why = _state(directory, job, queue)
    return StageStatus(
        name=link.stage.name,
        state=state,
        saved=_saved(directory),
        last=link.last,
        progress=_progress(link, directory),
        why=why or (_cause(directory) if state == "failed" else ""),
    )


def _state(directory: Path, job: str | None, queue: Mapping[str, str]) -> tuple[State, str]:
    if (directory / "DONE").exists():
        return "done", ""
    if job is not None and job in queue:
        running = queue[job] in ("RUNNING", "COMPLETING", "SUSPENDED")
        return ("running", "") if running else ("waiting", f"job {job} is {queue[job].lower()}")
    events = _events(directory)
    if not events:
        return "waiting", f"job {job} was cancelled" if job else "not started"
    if events[-1] in _FAILED:
        return "failed", ""
    if events[-1] in ("stopped", "ended"):
        return "waiting", f"{events[-1]} from outside; launch it again to go on"
    if job is not None:  # SLURM has forgotten it, and it said nothing itself
        return "failed", f"job {job} ended without a word: killed, or its node is gone"
    return "running", ""


def _events(directory: Path) -> list[str]:
    path = directory / "events.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [str(json.loads(line)["event"]) for line in lines]


def _saved(directory: Path) -> int | None:
    tracker = directory / "checkpoints" / "latest_checkpointed_iteration.txt"
    text = tracker.read_text(encoding="utf-8").strip() if tracker.exists() else ""
    return int(text) if text.isdigit() else None


def ends_of_logs(directory: Path) -> list[str]:
    """The ends of the ranks' outputs, the latest written first."""
    paths = (directory / "ranks").glob("*.log")
    newest = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    return [_end(path) for path in newest]


def _end(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return file.read().decode("utf-8", errors="replace")


def _progress(link: Link, directory: Path) -> Progress | None:
    for text in ends_of_logs(directory):
        found = list(_ITERATION.finditer(text))
        if found:
            iteration, seconds = int(found[-1]["iteration"]), float(found[-1]["ms"]) / 1000
            loss = found[-1]["loss"]
            return Progress(
                iteration=iteration,
                loss=float(loss) if loss else None,
                tokens_per_second=link.tokens / seconds if seconds else 0.0,
                seconds_left=(link.last - iteration) * seconds,
            )
    return None


def _cause(directory: Path) -> str:
    logs: Sequence[str] = ends_of_logs(directory)
    for pattern in _CAUSES:
        for text in logs:
            match = pattern.search(text)
            if match:
                return match[1]
    return f"nothing in {directory.name}/ranks says why"
