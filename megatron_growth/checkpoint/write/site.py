"""Where a checkpoint is written: a Megatron checkpoint directory that becomes one at the last step.

    SAVE/.growing-iter_0001000/     everything, under a name that no loader looks for
    SAVE/growth_manifest.json       how it came to be
    SAVE/iter_0001000/              by rename, once all is on storage
    SAVE/latest_checkpointed_iteration.txt     last: from now on SAVE is a checkpoint

A crash at any moment leaves either no `iter_*` directory, or a whole one that only lacks its
tracker; a second start finds out which. A lock on SAVE keeps a second writer out; the operating
system drops it with the process that holds it, however that ends.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint.directory import TRACKER
from megatron_growth.checkpoint.durable import clear_unfinished, sync_directory, write_safely
from megatron_growth.checkpoint.write.data_files import UNFINISHED
from megatron_growth.errors import CheckpointError

_LOCK = ".grow.lock"
_JOB = "job.json"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class Site:
    """A directory that is to become a Megatron checkpoint directory.

    Args:
        save: the directory; made where missing.
        name: of the checkpoint in it, `iter_*` or `release`.
        job: what is written; a growth of another job is not gone on with.
    """

    def __init__(self, save: Path, name: str, job: Mapping[str, Any]) -> None:
        self.save = save
        self.final = save / name
        self.work = save / f".growing-{name}"
        self._job = json.loads(json.dumps(job))
        self._lock: int | None = None
        self.notes: list[str] = []

    def check_free(self) -> None:
        """Refuse what is no directory that can be written to, and one that holds a checkpoint.

        Raises:
            CheckpointError: it is one of those.
        """
        there = self._there()
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"--save {str(self.save)!r} cannot be made: {str(there)!r} is "
                f"{'not writable for this user' if there.is_dir() else 'a file'}; give another "
                "directory"
            )
        if (self.save / TRACKER).exists():
            raise CheckpointError(
                f"{str(self.save)!r} already holds a checkpoint ({TRACKER}); give --save a new "
                "directory"
            )
        others = sorted(path.name for path in self.save.glob("iter_*") if path != self.final)
        if others or (self.final.exists() and not self.is_published):
            name = others[0] if others else self.final.name
            raise CheckpointError(
                f"{str(self.save)!r} already holds {name}; give --save a new directory"
            )

    @property
    def is_published(self) -> bool:
        """Whether the checkpoint of this very job is there, lacking its tracker at most."""
        written = manifest.read(self.save) or {}
        return self.final.is_dir() and written.get("written") == self._job

    def open(self, *, resume: bool) -> None:
        """Take the lock and make the working directory.

        Raises:
            CheckpointError: somebody else writes there, or an interrupted growth lies there and
                `resume` is not given, or it is of another job.
        """
        self.check_free()
        self.save.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self.check_free()  # again: whoever held the lock has gone
        clear_unfinished(self.save)
        if self.is_published:
            return
        if self.work.is_dir():
            self._check_interrupted(resume)
        self.work.mkdir(exist_ok=True)
        clear_unfinished(self.work)
        for part in self.work.glob(f"*{UNFINISHED}"):
            part.unlink()
        write_safely(self.work / _JOB, json.dumps(self._job))

    def _take_lock(self) -> None:
        path = self.save / _LOCK
        while self._lock is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise CheckpointError(
                    f"another growth is being written to {str(self.save)!r}; wait for it, or give "
                    "--save another directory"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self.notes.append(
                    f"warning: {self.save} has no file locks; see that nobody else writes there"
                )
            # Whoever held it before may have removed the file since it was opened.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                self._lock = descriptor
            else:
                os.close(descriptor)

    def _check_interrupted(self, resume: bool) -> None:
        try:
            before = dict(json.loads((self.work / _JOB).read_text()))
        except (OSError, ValueError, TypeError):
            shutil.rmtree(self.work)  # it had hardly begun
            return
        if not resume:
            raise CheckpointError(
                f"{str(self.work)!r} holds an interrupted growth; go on with --resume, or remove it"
            )
        if before != self._job:
            fields = before.keys() | self._job.keys()
            changed = sorted(name for name in fields if before.get(name) != self._job.get(name))
            raise CheckpointError(
                f"{str(self.work)!r} holds an interrupted growth of another job ({changed[0]} is "
                "not the same); remove it, or give --save another directory"
            )

    def check_space(self, nbytes: int) -> None:
        """Refuse what will not fit.

        Raises:
            CheckpointError: less than `nbytes` are free.
        """
        have = sum(path.stat().st_size for path in self.work.glob("__*.distcp"))
        free = self.free()
        if nbytes - have > free:
            raise CheckpointError(
                f"{str(self.save)!r} has {free:,} bytes free, but the grown checkpoint needs "
                f"{nbytes - have:,}; free some, give --save another file system, or use --mode link"
            )

    def free(self) -> int:
        """Bytes free where it is, or will be."""
        return shutil.disk_usage(self._there()).free

    def _there(self) -> Path:
        """The directory, or the nearest above it that exists."""
        return next(path for path in (self.save, *self.save.absolute().parents) if path.exists())

    def discard(self) -> None:
        """Remove a working directory in which nothing has been written."""
        if not any(self.work.glob("*.index")):
            shutil.rmtree(self.work)

    def publish(self, described: Mapping[str, Any]) -> None:
        """Make a finished working directory the checkpoint.

        Args:
            described: the manifest.

        Raises:
            CheckpointError: another checkpoint has come to be there meanwhile.
        """
        self.check_free()
        if not self.is_published:
            manifest.write(self.save, {**described, "written": self._job})
            sync_directory(self.work)
            self.work.rename(self.final)
            sync_directory(self.save)
        for leftover in (self.final / _JOB, *self.final.glob("*.index")):
            leftover.unlink(missing_ok=True)
        name = self.final.name
        word = name if name == "release" else str(int(name.removeprefix("iter_")))
        write_safely(self.save / TRACKER, word)

    def close(self) -> None:
        """Drop the lock."""
        if self._lock is not None:
            (self.save / _LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
