"""Where an experiment's stages are: waiting, running, done, failed and why.

Read from what the stages themselves leave behind (DONE, events.jsonl, the ranks' output and the
job's) and, where there is SLURM, from its queue. Nothing is asked of the processes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.events import read_events
from megatron_growth.launcher.here import holder
from megatron_growth.launcher.logs import Progress, cause, progress
from megatron_growth.launcher.marks import is_done, saved_iteration

State = Literal["waiting", "running", "done", "failed"]

_FAILED = ("failed", "preflight-failed", "refused")


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
        job: its job with SLURM or Kubernetes, None where it has none.
        queue: state of the jobs that those still know as waiting or running; None where it cannot
            be asked.
        workdir: directory that the relative paths of the experiment start from.
    """
    directory = workdir / link.directory
    state, why = _state(directory, None if queue is None else job, queue or {})
    return StageStatus(
        name=link.stage.name,
        state=state,
        saved=saved_iteration(directory),
        last=link.last,
        progress=progress(link, directory),
        why=why or (cause(directory) if state == "failed" else ""),
    )


def _state(directory: Path, job: str | None, queue: Mapping[str, str]) -> tuple[State, str]:
    if is_done(directory):
        return "done", ""
    if job is not None and job in queue:
        running = queue[job].split()[0] in ("RUNNING", "COMPLETING", "SUSPENDED")
        return ("running", "") if running else ("waiting", f"job {job} is {_in_words(queue[job])}")
    events = read_events(directory)
    if not events:
        ended = f"job {job} ended before it said anything: cancelled, or its cluster's log says why"
        return "waiting", ended if job else "not started"
    last = events[-1]
    if last["event"] in _FAILED:
        return "failed", ""
    if last["event"] in ("stopped", "ended"):
        return "waiting", f"{last['event']} from outside; launch it again to go on"
    here = last.get("host") == os.uname().nodename and last.get("job") == "local"
    if here and holder(directory) is None:
        return "failed", "ended without a word: killed; launch it again to go on"
    if job is not None and not here:  # the queue has forgotten it, and it said nothing itself
        return "failed", f"job {job} ended without a word: killed, or its node is gone"
    return "running", ""


def _in_words(said: str) -> str:
    """PENDING (Dependency): pending (Dependency)"""
    state, *reason = said.split(maxsplit=1)
    return " ".join([state.lower(), *reason])
