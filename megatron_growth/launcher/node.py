"""What is wrong with a node, seen from it alone: its GPUs, its modules, its disk.

Everything is asked of the node itself, in seconds, and an answer is a sentence that ends in what to
do. What a driver does not know is not asked: a missing answer is no failure.
"""

import importlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

_SECONDS = 30  # a driver that hangs is what we look for

# nvidia-smi's query, its field, and what an unhealthy answer means. The recovery action is the
# driver's own digest of the Xids that it has seen (since release 550).
_QUESTIONS = (
    ("gpu", "ecc.errors.uncorrected.volatile.total", "uncorrected ECC errors"),
    ("gpu", "gpu_recovery_action", "the driver asks, after an Xid, for"),
    ("remapped-rows", "remapped_rows.pending", "rows of memory that wait to be remapped"),
    ("remapped-rows", "remapped_rows.failure", "rows of memory that could not be remapped"),
)
_WELL = ("0", "no", "none")


def gpu_problems() -> Iterator[str]:
    """Errors that the driver remembers of this node's GPUs."""
    if shutil.which("nvidia-smi") is None:
        return
    for query, field, meaning in _QUESTIONS:
        try:
            answers = _asked(query, field)
        except subprocess.TimeoutExpired:
            yield f"nvidia-smi gives no answer in {_SECONDS} s; --exclude the node and reboot it"
            return
        for bus, answer in answers:
            # [N/A] and the like: this GPU does not say.
            if answer.lower() not in _WELL and not answer.startswith("["):
                yield f"GPU {bus}: {meaning}: {answer}; --exclude the node and reset the GPU"


def _asked(query: str, field: str) -> list[tuple[str, str]]:
    words = ["nvidia-smi", f"--query-{query}=gpu_bus_id,{field}", "--format=csv,noheader,nounits"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:  # a driver that does not know the field
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [(row[0], row[1]) for row in rows if len(row) == 2]


def module_problems(needed: Sequence[str]) -> Iterator[str]:
    """Modules that cannot be imported.

    Args:
        needed: `deep_ep:Buffer` for a module and a name in it, or a module alone.
    """
    for one in needed:
        module, _, name = one.partition(":")
        try:
            found = importlib.import_module(module)
            if name:
                getattr(found, name)
        except Exception as error:  # a broken extension raises whatever it likes
            said = " ".join(str(error).split())
            yield (
                f"{one} cannot be imported ({said}), and an option of the stage needs it; install "
                "it in the image, or take the option (dispatcher, transformer-impl) back"
            )


def disk_problems(checkpoints: Path, needed: int) -> Iterator[str]:
    """Why a checkpoint cannot be written.

    Args:
        checkpoints: its directory, made where missing.
        needed: its bytes.
    """
    probe = checkpoints / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"written")
        probe.unlink()
    except OSError as error:
        yield (
            f"{str(checkpoints)!r} cannot be written to: {error}; mount it on the node, or set "
            "`runs` to storage that all nodes share"
        )
        return
    free = shutil.disk_usage(checkpoints).free
    if free < needed:
        yield (
            f"{str(checkpoints)!r} has {free} bytes left, and one checkpoint needs {needed}; make "
            "room, or set `runs` to larger storage"
        )
