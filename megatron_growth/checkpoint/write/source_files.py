"""The base's data files while they are read: opened read-only, and watched for change.

A base that somebody writes to while it is grown would give a checkpoint of two states. So size and
time of modification of every file are taken once, before anything is read, and compared after each
data file that was written and at the end.
"""

import hashlib
import json
import os
from pathlib import Path

from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.errors import CheckpointError

INTEGRITY = "integrity.json"  # megatron/core/dist_checkpointing/validation.py
_HASH_BYTES = 8 << 20


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

    def _stat(self, name: str) -> tuple[int, int]:
        try:
            found = (self.directory / name).stat()
        except OSError as error:
            raise CheckpointError(
                f"{str(self.directory / name)!r} cannot be read ({error.strerror}); it must stay "
                "where it is while the base is grown"
            ) from None
        return found.st_size, found.st_mtime_ns

    def check_unchanged(self) -> None:
        """Refuse what was made from a base that changed.

        Raises:
            CheckpointError: a file has another size or time of modification than at the start.
        """
        for name, before in self.state.items():
            if (now := self._stat(name)) != before:
                raise CheckpointError(
                    f"{str(self.directory / name)!r} was changed while it was read (size, time of "
                    f"modification: {before} -> {now}); grow again once nothing writes to the base"
                )

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from a file.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        try:
            if name not in self._open:
                self._open[name] = os.open(self.directory / name, os.O_RDONLY)
                os.posix_fadvise(self._open[name], 0, 0, os.POSIX_FADV_SEQUENTIAL)
            done = 0
            while done < len(buffer):
                count = os.preadv(self._open[name], [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{str(self.directory / name)!r} ends at byte {offset + done} of "
                        f"{offset + len(buffer)}: it was cut short; restore it or use another "
                        "iteration"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{str(self.directory / name)!r} cannot be read ({error.strerror}); restore it or "
                "use another iteration"
            ) from None

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
        found = sha256_of(path)
        if found != expected:
            raise CheckpointError(
                f"{str(path)!r} has SHA-256 {found[:16]}..., not {expected[:16]}... as {INTEGRITY} "
                "says: the base is damaged; restore the file or use another iteration"
            )

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


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
