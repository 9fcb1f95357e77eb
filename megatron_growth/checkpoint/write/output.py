"""A data file written from front to back while the next bytes are being made.

What is written goes into one of two blocks of memory. A full one is handed to a thread, which
writes it and starts a sync now and then: the maker of the bytes waits for the disk only when it is
a block ahead.
"""

import hashlib
import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

_BLOCK_BYTES = 16 << 20
_SYNC_BYTES = 128 << 20  # between two syncs: more would fill the page cache and stall in the end


class Output(io.RawIOBase):
    """A data file, as a file that torch.save can write to.

    Args:
        path: made, or emptied.
        hashed: take a SHA-256 of what is written.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, path: Path, *, hashed: bool) -> None:
        self.size = 0
        self._hash = hashlib.sha256() if hashed else None
        self._blocks = [memoryview(bytearray(_BLOCK_BYTES)) for _ in range(2)]
        self._used = 0  # of the first block
        self._unsynced = 0
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    @property
    def sha256(self) -> str | None:
        """Of the whole file, once it is closed; in hexadecimal."""
        return self._hash.hexdigest() if self._hash else None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        self.size += (total := len(rest))
        while rest:
            room = min(len(rest), _BLOCK_BYTES - self._used)
            self._blocks[0][self._used : self._used + room] = rest[:room]
            self._used += room
            rest = rest[room:]
            if self._used == _BLOCK_BYTES:
                self._hand_over()
        return total

    def _hand_over(self) -> None:
        """Have the first block written, and go on in the other, which has been."""
        if self._pending is not None:
            self._pending.result()
        self._pending = self._writer.submit(self._write_out, self._blocks[0][: self._used])
        self._blocks.reverse()
        self._used = 0

    def _write_out(self, block: memoryview) -> None:
        if self._hash:
            self._hash.update(block)
        self._unsynced += len(block)
        while block:
            block = block[os.write(self._descriptor, block) :]
        if self._unsynced >= _SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        os.fdatasync(self._descriptor)
        self._unsynced = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._hand_over()
                self._writer.submit(self._sync).result()
                assert self._pending is not None
                self._pending.result()
        finally:
            self._writer.shutdown()
            os.close(self._descriptor)
