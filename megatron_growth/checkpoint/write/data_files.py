"""The data files of a written checkpoint: which contents each holds, and writing one.

The cut into files follows from the base and the plan alone, and each file is written from front to
back by one worker. So the bytes are the same for any number of workers, and a growth that was
interrupted goes on file by file: a file is finished when its index lies beside it.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_growth.checkpoint.common_state import grown_common_state
from megatron_growth.checkpoint.durable import write_safely
from megatron_growth.checkpoint.units import Unit, group, index_of
from megatron_growth.checkpoint.values import Values, narrow, parts_of
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.checkpoint.write.contents import Content
from megatron_growth.checkpoint.write.output import Output
from megatron_growth.checkpoint.write.records import LoadedChunks, RecordBuffer, RecordReader
from megatron_growth.checkpoint.write.source_files import SourceFiles
from megatron_growth.planning.pieces import Shape

FILE_BYTES = 1 << 30  # a data file is closed once it holds so much
UNFINISHED = ".part"
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
    with Output(unfinished, hashed=bool(files.hashes)) as output:
        for unit in file.units:
            wanted = [index_of(chunk) for chunk in unit.chunks]
            wanted += [c.record for c in unit.items if c.record is not None]
            raw = reader.read(dict.fromkeys(wanted))
            values = Values(view, LoadedChunks(view, unit.chunks, raw))
            for chunk in unit.chunks:
                values.check_master(chunk)
            for content in unit.items:
                start, copies = output.size, len(content.targets) if apart else 1
                if content.record is not None:
                    record = raw[content.record]
                elif copies > 1:
                    record = buffer.save(maker.made(content, values))
                else:
                    torch.save(maker.made(content, values), output)
                    copies, record = 0, memoryview(b"")
                for _ in range(copies):
                    output.write(record)
                records.append((start, len(record) or output.size - start))
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
