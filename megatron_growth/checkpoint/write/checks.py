"""Whether a base's data files hold what was saved, by sums that were taken then.

Megatron's integrity manifest has one for each file. Without it there are those in the records:
torch.save writes a CRC-32 beside what it stores, which torch.load does not look at. A record's own
header has none, so tensors are loaded as well, and masters compared with their weights.
"""

import io
import zipfile
from collections import defaultdict
from functools import cached_property

from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_growth.checkpoint.units import beside, index_of
from megatron_growth.checkpoint.values import Values
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.checkpoint.write.records import LoadedChunks, RecordReader, RecordStream
from megatron_growth.checkpoint.write.source_files import SourceFiles
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.pieces import Box, Copy, Piece

_READ_BYTES = 8 << 20


class BaseChecks:
    """Checks data files of the base.

    Args:
        view: the grown view of it.
        files: its files.
    """

    def __init__(self, view: GrownView, files: SourceFiles) -> None:
        self._view = view
        self._files = files

    def check(self, name: str) -> None:
        """Check one data file.

        Raises:
            CheckpointError: it is damaged.
        """
        if self._files.hashes:
            self._files.check_hash(name)
        else:
            self._check_records(name)

    @cached_property
    def _records(self) -> dict[str, list[MetadataIndex]]:
        """The records of each data file, in the order they lie."""
        found: dict[str, list[MetadataIndex]] = defaultdict(list)
        places = self._view.source.metadata.storage_data.items()
        for index, info in sorted(places, key=lambda place: place[1].offset):
            found[info.relative_path].append(index)
        return found

    def _check_records(self, name: str) -> None:
        reader = RecordReader(self._view, self._files)
        for index in self._records[name]:
            (record,) = reader.read([index]).values()
            _check_sums(record, f"{index.fqn} in {str(self._files.directory / name)!r}")
            if index.fqn in self._view.source.tensors:
                self._check_tensor(index, reader)
        self._files.close()

    def _check_tensor(self, index: MetadataIndex, reader: RecordReader) -> None:
        offsets = tuple(index.offset or ())
        place = Box(offsets, (1,) * len(offsets))
        for box in self._view.source_chunks(index.fqn, place):
            chunk = (index.fqn, box)
            near = beside(self._view, Piece(box, index.fqn, box, Copy()))
            chunks = list(dict.fromkeys([chunk, *near]))
            loaded = LoadedChunks(self._view, chunks, reader.read(map(index_of, chunks)))
            _ = loaded[chunk]
            Values(self._view, loaded).check_master(chunk)


def _check_sums(record: memoryview, where: str) -> None:
    try:
        with zipfile.ZipFile(io.BufferedReader(RecordStream(record), _READ_BYTES)) as archive:
            bad = archive.testzip()
    except Exception as error:  # damaged bytes can raise anything
        bad = f"archive ({error})"
    if bad:
        raise CheckpointError(
            f"{where} fails its checksum in {bad}: the base is damaged; use another iteration or "
            "restore the file"
        )
