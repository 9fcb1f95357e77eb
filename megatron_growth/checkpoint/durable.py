"""Small files written whole or not at all, and on storage before anything that relies on them."""

import os
import tempfile
from pathlib import Path

_UNFINISHED = ".unfinished-"


def write_safely(path: Path, content: str | bytes) -> None:
    """Write a file under another name, sync it, and give it its name by rename."""
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(
        "wb", dir=path.parent, prefix=_UNFINISHED, delete=False
    ) as file:
        try:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    sync_directory(path.parent)


def clear_unfinished(directory: Path) -> None:
    """Remove what was being written in a directory when its writer was killed."""
    for path in directory.glob(f"{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
