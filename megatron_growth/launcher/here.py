"""This machine: the stages of one node each, one after the other.

A stage is a process group of its own. Ctrl-C, and a TERM to the launcher, are passed on to its
`node.sh` alone, which lets the run save before it ends. While a stage runs a lock in its directory
is held, by `node.sh` and what that started, torchrun's agent above all; not by the agent's ranks.
"""

import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_growth.errors import StageError
from megatron_growth.launcher import jobs
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment

LOCKS = ".lock.*"  # one for each node, as node.sh names them; in it the process id of node.sh


def holder(directory: Path) -> str | None:
    """The process id of a stage's `node.sh` if it, or what it started, still runs as far as this
    machine can tell; None if nothing does."""
    for path in directory.glob(LOCKS):
        try:
            with path.open(encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return path.read_text(encoding="utf-8").strip()
        except OSError:  # not for us to read, or a file system without locks
            continue
    return None


def submit(experiment: Experiment, links: Sequence[Link], workdir: Path) -> Iterator[str]:
    """Run the stages; a line when one starts, and one when it ends.

    Raises:
        StageError: one failed, or was stopped.
    """
    for index, link in enumerate(links, start=1):
        jobs.forget(workdir / experiment.directory, link.stage.name)
        yield f"{link.stage.name}: running"
        code, stopped_by = _run(workdir / link.directory / "node.sh")
        if code and stopped_by:
            raise StageError(
                f"stage {link.stage.name!r} was stopped; launch again to go on from what it saved",
                128 + stopped_by,
            )
        if code:
            raise StageError(
                f"stage {link.stage.name!r} ended with exit code {code}; see "
                f"{str(link.directory / 'ranks')!r}, put it right, and launch again to go on",
                code if code > 0 else 128 - code,
            )
        yield f"{link.stage.name}: done"
        if stopped_by and links[index:]:
            raise StageError(
                f"stopped before stage {links[index].stage.name!r}; launch again to go on",
                128 + stopped_by,
            )


def _run(script: Path) -> tuple[int, int]:
    """Run a stage's script; its exit code, and the signal that was passed on to it, 0 for none."""
    came: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not came:
            os.write(2, b"stopping: the run saves after its current step\n")
        came.append(number)
        for process in started:
            process.terminate()

    with _handled(stop):
        process = subprocess.Popen(["bash", str(script)], start_new_session=True)
        started.append(process)
        if came:
            process.terminate()
        code = process.wait()
    return code, came[-1] if came else 0


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While inside, INT and TERM are the handler's."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
