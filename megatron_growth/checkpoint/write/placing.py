"""How a written checkpoint takes over a base's data file without writing its bytes.

    link      a hard link: one file with two names. Deleting the base leaves it whole.
    reflink   a copy that shares the bytes on storage until one of the two is changed (XFS, Btrfs)
    symlink   a name for the base's file, which must then stay; only when asked for by name

A placed file has another name than Megatron would write to: a later save into the same directory
makes new files and cannot reach the base's bytes through a shared one.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from megatron_growth.errors import CheckpointError

Placing = Literal["link", "reflink", "symlink"]
_FICLONE = 0x40049409  # linux/fs.h
_REFUSED = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EINVAL,
            errno.ENOTTY, errno.ENOSYS}  # fmt: skip


def placed_name(name: str) -> str:
    """What a base's data file is called in the grown checkpoint: one name for each, and none that
    Megatron gives."""
    return f"base{name}"


def place(source: Path, target: Path, how: Placing) -> None:
    """Put a base's data file into the grown checkpoint.

    Raises:
        CheckpointError: the file system cannot; the message says which way is left.
    """
    target.unlink(missing_ok=True)  # of an interrupted growth
    try:
        _WAYS[how](source.resolve(), target)
    except OSError as error:
        if not source.exists():
            raise CheckpointError(
                f"{str(source)!r} is gone; the base must stay where it is while it is grown"
            ) from None
        if error.errno not in _REFUSED:
            raise
        target.unlink(missing_ok=True)
        raise CheckpointError(
            f"{str(source)!r} cannot be taken over by {how} ({error.strerror}: {_WHY[how]}); use "
            f"{_ELSE[how]}"
        ) from None


def _reflink(source: Path, target: Path) -> None:
    with source.open("rb") as original, target.open("wb") as copy:
        fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
        os.fsync(copy.fileno())


_WAYS: dict[Placing, Callable[[Path, Path], None]] = {
    "link": os.link,
    "reflink": _reflink,
    "symlink": os.symlink,
}
_WHY: dict[Placing, str] = {
    "link": "a hard link needs one file system, and a file that is yours",
    "reflink": "it needs one file system that can share bytes, such as XFS or Btrfs",
    "symlink": "the file system has none",
}
_ELSE: dict[Placing, str] = {
    "link": "--mode copy, or --mode symlink if the base stays where it is",
    "reflink": "--mode copy, or --mode link on the base's own file system",
    "symlink": "--mode copy",
}
