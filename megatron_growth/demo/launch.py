"""One run under torchrun: all that it prints in a log, and its failure on one line."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_growth.errors import GrowthError

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 30

# The line that says what went wrong: ours, or as in `[rank0]: RuntimeError: shape mismatch`.
_CAUSES = (
    re.compile(r"^megatron_growth: error.*?: (.*)$", re.MULTILINE),
    re.compile(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b.*)$", re.MULTILINE),
)


@dataclass(frozen=True)
class Run:
    """One torchrun."""

    name: str
    """What it is called in messages."""

    ranks: int
    """Processes."""

    words: Sequence[str]
    """What torchrun starts, and its arguments."""

    log: Path
    """For all that the ranks print."""


def launch(run: Run, watch: Callable[[], None]) -> None:
    """Run it to its end.

    Args:
        run: what to start.
        watch: called now and then while it runs.

    Raises:
        GrowthError: it failed; the message has the cause, where one is found, and the log.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(run.ranks), *run.words]
    # A rank is one thread: there are as many ranks as cores, or more. It sees no GPU: a machine
    # with one would have to have four.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("w", encoding="utf-8") as log, _termination_as_exit():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            while process.poll() is None:
                watch()
                time.sleep(_POLL_SECONDS)
        finally:
            _end(process)
    if process.returncode != 0:
        raise GrowthError(
            f"the run {run.name!r} failed with exit code {process.returncode}: {_cause(run.log)}; "
            f"see its log, {str(run.log)!r}"
        )


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    """SIGTERM ends Python on the spot; as an exit it gives us the time to end the ranks."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    original = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, original)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave no rank behind when we are interrupted: torchrun passes the signal on to its ranks."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_SECONDS)
        process.kill()
        process.wait()


def _cause(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    found = (line for pattern in _CAUSES for line in pattern.findall(text))
    return next(found, "no rank said why")
