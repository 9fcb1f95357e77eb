"""The base's data files while they are read: opened read-only, and watched for change.

A base that somebody writes to while it is grown would give a checkpoint of two states. So size and
time of modification of every file are taken once, before anything is read, and compared again: of
those that were read after each data file that was written, of all at the end.
"""

import hashlib
import json
import os
from pathlib import Path

from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.errors import CheckpointError

INTEGRITY = "integrity.json"  # megatron/core/dist_checkpointing/validation.py
_OPEN_FILES = 64  # at a time; a base has one for each rank or more


class SourceFiles:
    """The data files of a base.

    Attributes:
        directory: that they are in.
        state: size in bytes and time of modification in ns, by file name.
        hashes: SHA-256 by file name, of Megatron's own integrity manifest; empty without one.
    """

    def __init__(self, source: SourceCheckpoint) -> None:
        self.directory = source.directory
        names = {info.relative_path for info in source.metadata.storage_data.values()}
        self.state = {name: self._stat(name) for name in sorted(names)}
        self.hashes = _hashes(self.directory)
        self._open: dict[str, int] = {}
        self._read: set[str] = set()

    def _stat(self, name: str) -> tuple[int, int]:
        try:
            found = (self.directory / name).stat()
        except OSError as error:
            raise CheckpointError(_unreadable(str(self.directory / name), error)) from None
        return found.st_size, found.st_mtime_ns

    def check_read(self) -> None:
        """Refuse what was made of files that changed since, and close them."""
        for name in sorted(self._read):
            self._check_unchanged(name)
        self._read.clear()
        self.close()

    def check_all(self) -> None:
        """The same for all files."""
        for name in self.state:
            self._check_unchanged(name)

    def _check_unchanged(self, name: str) -> None:
        """Refuse a file that has another size or time of modification than at the start."""
        before, now = self.state[name], self._stat(name)
        if now != before:
            raise CheckpointError(
                f"{str(self.directory / name)!r} was changed while it was read (size, time of "
                f"modification: {before} -> {now}); grow again once nothing writes to the base"
            )

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from a file.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        path = str(self.directory / name)
        try:
            descriptor = self._descriptor(name)
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{path!r} ends at byte {offset + done} of {offset + len(buffer)}: it was "
                        "cut short; restore it or use another iteration"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(_unreadable(path, error)) from None

    def _descriptor(self, name: str) -> int:
        """An open file; the one opened longest ago is closed when there are many."""
        if name not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[name] = os.open(self.directory / name, os.O_RDONLY)
            os.posix_fadvise(self._open[name], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._read.add(name)
        return self._open[name]

    def check_hash(self, name: str) -> None:
        """Compare a file with Megatron's integrity manifest.

        Raises:
            CheckpointError: they differ, or the manifest does not know the file.
        """
        path, expected = self.directory / name, self.hashes.get(name)
        if expected is None:
            raise CheckpointError(
                f"{str(self.directory / INTEGRITY)!r} does not list {name}; the base was changed "
                "after its save: use another iteration"
            )
        try:
            found = sha256_of(path)
        except OSError as error:
            raise CheckpointError(_unreadable(str(path), error)) from None
        if found != expected:
            raise CheckpointError(
                f"{str(path)!r} has SHA-256 {found[:16]}..., not {expected[:16]}... as {INTEGRITY} "
                "says: the base is damaged; restore the file or use another iteration"
            )

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _unreadable(path: str, error: OSError) -> str:
    return (
        f"{path!r} cannot be read ({error.strerror}); the base must stay where it is, readable for "
        "this user, while it is grown"
    )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(directory: Path) -> dict[str, str]:
    path = directory / INTEGRITY
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        algorithm, files = content.get("algorithm", "sha256"), dict(content["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged ({error}); restore it, or remove it and use --checksum"
        ) from None
    if algorithm != "sha256":
        raise CheckpointError(
            f"{str(path)!r} uses {algorithm!r}, which is not known; remove it and use --checksum"
        )
    return files
