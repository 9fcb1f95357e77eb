"""Records: the bytes of one saved tensor or object in a data file, as torch.save wrote them.

A unit's records are read one after the other into one buffer that the next unit reuses: fresh
memory costs more than the disk. Where a record's bytes are wanted as they are, they are passed on;
where values are wanted, torch.load reads them from the same buffer, once.
"""

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_growth.checkpoint.units import Chunk, index_of
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.checkpoint.write.source_files import SourceFiles
from megatron_growth.errors import CheckpointError

_MESSAGE = 120  # characters of torch's own, which tells a story


class RecordReader:
    """Reads records of the base.

    Attributes:
        nbytes: read so far.
    """

    def __init__(self, view: GrownView, files: SourceFiles) -> None:
        self._storage: dict[MetadataIndex, Any] = view.source.metadata.storage_data
        self._files = files
        self._buffer = memoryview(bytearray(0))
        self.nbytes = 0

    def read(self, indices: Iterable[MetadataIndex]) -> dict[MetadataIndex, memoryview]:
        """The bytes of some records; they hold until the next call.

        Raises:
            CheckpointError: a file is shorter than its metadata says, or was changed.
        """
        infos = {index: self._storage[index] for index in indices}
        total = sum(info.length for info in infos.values())
        if total > len(self._buffer):
            self._buffer = memoryview(bytearray(total))
        found, start = {}, 0
        order = sorted(infos, key=lambda i: (infos[i].relative_path, infos[i].offset))
        for index in order:
            info = infos[index]
            found[index] = self._buffer[start : start + info.length]
            self._files.read_into(info.relative_path, info.offset, found[index])
            start += info.length
        self.nbytes += total
        return found


class LoadedChunks(Mapping[Chunk, torch.Tensor]):
    """Source chunks as tensors, each loaded from its record when it is first asked for."""

    def __init__(
        self, view: GrownView, chunks: Iterable[Chunk], records: dict[MetadataIndex, memoryview]
    ) -> None:
        self._view = view
        self._chunks = dict.fromkeys(chunks)
        self._records = records
        self._loaded: dict[Chunk, torch.Tensor] = {}

    def __getitem__(self, chunk: Chunk) -> torch.Tensor:
        if chunk not in self._loaded:
            self._loaded[chunk] = self._load(chunk)
        return self._loaded[chunk]

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._chunks

    def _load(self, chunk: Chunk) -> torch.Tensor:
        key, box = chunk
        try:
            stream = RecordStream(self._records[index_of(chunk)])
            tensor = torch.load(stream, map_location="cpu", weights_only=True)
            return tensor.view(box.sizes)
        except Exception as error:  # unpickling damaged bytes can raise anything
            line = " ".join(str(error).split())[:_MESSAGE]
            raise CheckpointError(
                f"{key} at {list(box.offsets)} in {str(self._view.source.directory)!r} cannot be "
                f"read ({type(error).__name__}: {line}); the base is damaged: use another iteration"
            ) from None


class RecordStream(io.RawIOBase):
    """A record as a file to read, without copying it."""

    def __init__(self, record: memoryview) -> None:
        self._record = record
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._record)}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._record[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


class RecordBuffer(io.RawIOBase):
    """Memory that torch.save writes a record to; the next record reuses it."""

    def __init__(self) -> None:
        self._memory = bytearray()
        self._size = 0

    def save(self, content: object) -> memoryview:
        """A record of `content`; it holds until the next call."""
        self._size = 0
        torch.save(content, self)
        return memoryview(self._memory)[: self._size]

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        end = self._size + len(view)
        if end > len(self._memory):
            self._memory = self._memory[: self._size] + bytearray(end - self._size)
        self._memory[self._size : end] = view
        self._size = end
        return len(view)
