"""What the ranks' output says: how far a stage is, and why it failed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.events import read_events

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
# What a start on this machine was at when it ended.
_LOCAL = {"preflight-failed": "preflight", "refused": "refused"}
# What a shell makes of a signal.
_SIGNALS = {137: " (killed: by hand, or for want of memory)", 143: " (asked to end)"}
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


def ends_of_logs(directory: Path, names: str = "*.log") -> Iterator[str]:
    """The ends of the ranks' outputs, the latest written first, each read when it is asked for."""
    paths = (directory / "ranks").glob(names)
    newest = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    return map(_end, newest)


def _end(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return file.read().decode("utf-8", errors="replace")


def progress(link: Link, directory: Path) -> Progress | None:
    """How far the log that was written last says that a stage is."""
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


def cause(directory: Path) -> str:
    """Why a stage failed, in the words of its last start.

    The rank that fails first is the first that falls silent.
    """
    last = read_events(directory)[-1]
    job = last.get("job", "local")
    names = f"{job}.{last.get('restart', 0)}.*.log"
    if job == "local":  # one log for all starts: what an earlier one wrote is over
        names = f"node*.{_LOCAL.get(str(last['event']), 'train')}.log"
    texts = [_START.split(text)[-1] for text in ends_of_logs(directory, names)][::-1]
    output = directory / "slurm" / f"{job}.out"
    if output.exists():
        texts.append(_START.split(_end(output))[-1])
    found = [match[1] for one in _CAUSES for text in texts for match in one.finditer(text)]
    own = (said for said in found if not _WITH_ANOTHER.search(said))
    nothing = f"nothing in {directory.name}/ranks or {directory.name}/slurm says why"
    if last.get("code"):
        nothing += f"; exit code {last['code']}{_SIGNALS.get(last['code'], '')}"
    return next(own, found[0] if found else nothing)
