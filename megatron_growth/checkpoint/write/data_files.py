"""The data files of a written checkpoint: which contents each holds, and writing one.

The cut into files follows from the base and the plan alone, and each file is written from front to
back by one worker. So the bytes are the same for any number of workers, and a growth that was
interrupted goes on file by file: a file is finished when its index lies beside it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch

from megatron_growth.checkpoint.common_state import grown_common_state
from megatron_growth.checkpoint.durable import write_safely
from megatron_growth.checkpoint.units import Unit, group, index_of
from megatron_growth.checkpoint.values import Values, narrow, parts_of
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.checkpoint.write.contents import Content
from megatron_growth.checkpoint.write.records import LoadedChunks, RecordBuffer, RecordReader
from megatron_growth.checkpoint.write.source_files import SourceFiles
from megatron_growth.planning.plan import Shape

FILE_BYTES = 1 << 30  # a data file is closed once it holds so much
UNFINISHED = ".part"
_SYNC_BYTES = 128 << 20  # between two syncs: more would fill the page cache and stall in the end
_KEPT = 4  # tensors whose memory is kept: a layer has few shapes
_RECORD_BYTES = 1 << 10  # what torch.save adds to a tensor's bytes, about


@dataclass(frozen=True, eq=False)
class DataFile:
    """A data file to be written.

    Attributes:
        name: as Megatron names them; never that of a linked file.
        units: source chunks to be read together, with the contents made of them.
        nbytes: to be written, about; records' headers are estimated.
    """

    name: str
    units: list[Unit[Content]]
    nbytes: int


@dataclass(frozen=True)
class FileIndex:
    """A data file that was written: what metadata must know of it.

    Attributes:
        records: offset and length of each content's first copy, in the order of the file's
            contents; further copies follow at once.
        read: bytes read from the base for it.
        written: its size.
        sha256: of its bytes; None where the base has no such sums either.
    """

    records: list[tuple[int, int]]
    read: int
    written: int
    sha256: str | None

    @classmethod
    def of_finished(cls, directory: Path, name: str) -> "FileIndex | None":
        """The index of a data file that is there as it was written; None where it is not, or not
        whole, whatever happened to it."""
        try:
            index = cls(**json.loads(index_path(directory, name).read_text()))
            size = (directory / name).stat().st_size
        except (OSError, ValueError, TypeError):
            return None
        return index if size == index.written else None


def data_files(view: GrownView, contents: Iterable[Content], *, apart: bool) -> list[DataFile]:
    """Cut contents into data files, in the order that the base's bytes lie.

    Args:
        view: the grown view.
        contents: to be written.
        apart: each place gets bytes of its own; otherwise those of one content share them.
    """
    units = sorted(group((c, c.chunks) for c in contents), key=lambda unit: _position(view, unit))
    files: list[DataFile] = []
    batch: list[Unit[Content]] = []
    size = 0
    for unit in _split(units):
        batch.append(unit)
        size += sum(_size(view, c) * (len(c.targets) if apart else 1) for c in unit.items)
        if size >= FILE_BYTES:
            files.append(DataFile(f"__{len(files)}_0.distcp", batch, size))
            batch, size = [], 0
    if batch:
        files.append(DataFile(f"__{len(files)}_0.distcp", batch, size))
    return files


def _split(units: Iterable[Unit[Content]]) -> Iterator[Unit[Content]]:
    """Contents that need no chunk, zeros and objects, need not stay together."""
    for unit in units:
        if unit.chunks:
            yield unit
        else:
            yield from (Unit([], [content]) for content in unit.items)


def _position(view: GrownView, unit: Unit[Content]) -> tuple[str, int]:
    storage = view.source.metadata.storage_data
    infos = [storage[index_of(chunk)] for chunk in unit.chunks]
    return min(((info.relative_path, info.offset) for info in infos), default=("", -1))


def _size(view: GrownView, content: Content) -> int:
    if content.record is not None:
        return int(view.source.metadata.storage_data[content.record].length)
    return content.nbytes + _RECORD_BYTES


def write_data_file(
    view: GrownView,
    files: SourceFiles,
    file: DataFile,
    directory: Path,
    *,
    apart: bool,
) -> FileIndex:
    """Write one data file and, once its bytes are safe on storage, the index beside it.

    Raises:
        CheckpointError: the base is damaged or was changed, or there is no space left.
    """
    reader, buffer, maker = RecordReader(view, files), RecordBuffer(), _Maker(view)
    records: list[tuple[int, int]] = []
    # Under a name of this process's own: a worker that outlived its growth cannot write into a file
    # that another one has finished.
    unfinished = directory / f"{file.name}.{os.uname().nodename}.{os.getpid()}{UNFINISHED}"
    with _Output(unfinished, hashed=bool(files.hashes)) as output:
        for unit in file.units:
            wanted = [index_of(chunk) for chunk in unit.chunks]
            wanted += [c.record for c in unit.items if c.record is not None]
            raw = reader.read(dict.fromkeys(wanted))
            values = Values(view, LoadedChunks(view, unit.chunks, raw))
            for chunk in unit.chunks:
                values.check_master(chunk)
            for content in unit.items:
                record = (
                    buffer.save(maker.made(content, values))
                    if content.record is None
                    else raw[content.record]
                )
                records.append((output.size, len(record)))
                for _ in content.targets if apart else content.targets[:1]:
                    output.write(record)
    files.check_read()
    unfinished.rename(directory / file.name)
    index = FileIndex(records, reader.nbytes, output.size, output.sha256)
    write_safely(index_path(directory, file.name), json.dumps(asdict(index)))
    return index


def index_path(directory: Path, name: str) -> Path:
    """Where a data file's index lies while the checkpoint is being written."""
    return directory / f"{name}.index"


class _Maker:
    """Makes the values of computed contents, in memory that the next of the same shape reuses."""

    def __init__(self, view: GrownView) -> None:
        self._view = view
        self._kept: dict[tuple[Shape, torch.dtype], torch.Tensor] = {}

    def made(self, content: Content, values: Values) -> object:
        """What a content's record holds; it holds until the next call."""
        view = self._view
        if content.box is None:
            return [grown_common_state(view.source.common_state or {}, view.plan)]
        tensor = self._memory(content.box.sizes, view.dtypes[content.key])
        for part in parts_of(view, content.key, content.box):
            values.write(part, narrow(tensor, content.box, part.target))
        return tensor

    def _memory(self, sizes: Shape, dtype: torch.dtype) -> torch.Tensor:
        """A tensor whose storage is its own: torch.save writes all of a storage."""
        kept = self._kept.pop((sizes, dtype), None)
        tensor = torch.empty(sizes, dtype=dtype) if kept is None else kept
        self._kept[sizes, dtype] = tensor
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return tensor


class _Output:
    """A data file that is written from front to back, and synced in the background as it grows."""

    def __init__(self, path: Path, *, hashed: bool) -> None:
        self.size = 0
        self._path = path
        self._hash = hashlib.sha256() if hashed else None
        self._synced = 0
        self._pending: Future[None] | None = None

    @property
    def sha256(self) -> str | None:
        return self._hash.hexdigest() if self._hash else None

    def __enter__(self) -> "_Output":
        self._syncer = ThreadPoolExecutor(1)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._sync()
                self._wait()
        finally:
            self._syncer.shutdown()
            os.close(self._descriptor)

    def write(self, data: memoryview) -> None:
        if self._hash:
            self._hash.update(data)
        done = 0
        while done < len(data):
            done += os.write(self._descriptor, data[done:])
        self.size += len(data)
        if self.size - self._synced >= _SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        """Start a sync of what is written, once the one before is through."""
        self._wait()
        self._synced = self.size
        self._pending = self._syncer.submit(os.fdatasync, self._descriptor)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
