"""Where an experiment's stages are: waiting, running, done, failed and why.

Read from what the stages themselves leave behind (DONE, events.jsonl, the ranks' output and the
job's) and, where there is SLURM, from its queue. Nothing is asked of the processes.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.here import holder

State = Literal["waiting", "running", "done", "failed"]

# [...] iteration  65/  100 | ... | elapsed time per iteration (ms): 472.2 | ... | lm loss: 2.75E+00
_ITERATION = re.compile(
    r"iteration +(?P<iteration>\d+)/ *\d+ \|.*?"
    r"elapsed time per iteration \(ms\): (?P<ms>[\d.]+) \|(.*? lm loss: (?P<loss>[\d.Ee+-]+))?"
)
# The line that says what went wrong, the most telling first.
_CAUSES = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"^(?:megatron_growth: error.*?|preflight): (.*)$",  # ours
        r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b.*)$",  # [rank0]: RuntimeError: mismatch
        r"^srun: error: (.*\btasks? .*)$",  # srun: error: n2: task 1: Killed
        r"(failed \(exitcode: -\d+\) local_rank: .*)$",  # torchrun's account of the same
        r"^slurmstepd.*?: error: (.*)$",
        r"^megatron-growth: (.*)$",  # the job's own
    )
)
# Said of a rank that only ended with another.
_WITH_ANOTHER = re.compile(
    r"by peer|remote (?:process|server)|likely closed|ChildFailedError|SignalException"
    r"|Exited with|Terminated$|CANCELLED AT"
)
# The job's output goes on after a requeue; each start begins with such a line.
_START = re.compile(r"^=== start \d+", re.MULTILINE)
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
    link: Link, job: str | None, queue: Mapping[str, str] | None, workdir: Path
) -> StageStatus:
    """Where a stage is.

    Args:
        link: the stage.
        job: its SLURM job, None where it has none.
        queue: state of the jobs that SLURM still knows as waiting or running; None where it cannot
            be asked.
        workdir: directory that the relative paths of the experiment start from.
    """
    directory = workdir / link.directory
    state, why = _state(directory, None if queue is None else job, queue or {})
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
        running = queue[job].split()[0] in ("RUNNING", "COMPLETING", "SUSPENDED")
        return ("running", "") if running else ("waiting", f"job {job} is {_in_words(queue[job])}")
    events = _events(directory)
    if not events:
        return "waiting", f"job {job} was cancelled" if job else "not started"
    last = events[-1]
    if last["event"] in _FAILED:
        return "failed", ""
    if last["event"] in ("stopped", "ended"):
        return "waiting", f"{last['event']} from outside; launch it again to go on"
    if job is not None:  # the queue has forgotten it, and it said nothing itself
        return "failed", f"job {job} ended without a word: killed, or its node is gone"
    was_here = last.get("host") == os.uname().nodename and last.get("job") == "local"
    if was_here and holder(directory) is None:
        return "failed", "ended without a word: killed; launch it again to go on"
    return "running", ""


def _in_words(said: str) -> str:
    """PENDING (Dependency): pending (Dependency)"""
    state, *reason = said.split(maxsplit=1)
    return " ".join([state.lower(), *reason])


def _events(directory: Path) -> list[dict[str, Any]]:
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


def _saved(directory: Path) -> int | None:
    tracker = directory / "checkpoints" / "latest_checkpointed_iteration.txt"
    text = tracker.read_text(encoding="utf-8").strip() if tracker.exists() else ""
    return int(text) if text.isdigit() else None


def ends_of_logs(directory: Path, names: str = "*.log") -> Iterator[str]:
    """The ends of the ranks' outputs, the latest written first, each read when it is asked for."""
    paths = (directory / "ranks").glob(names)
    newest = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    return map(_end, newest)


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
    """In the words of the last start. The rank that fails first is the first that falls silent."""
    last = _events(directory)[-1]
    job = last.get("job", "local")
    names = "*.log" if job == "local" else f"{job}.{last.get('restart', 0)}.*.log"
    texts = list(ends_of_logs(directory, names))[::-1]
    output = directory / "slurm" / f"{job}.out"
    if output.exists():
        texts.append(_START.split(_end(output))[-1])
    found = [match[1] for one in _CAUSES for text in texts for match in one.finditer(text)]
    own = (said for said in found if not _WITH_ANOTHER.search(said))
    nothing = f"nothing in {directory.name}/ranks or {directory.name}/slurm says why"
    return next(own, found[0] if found else nothing)
