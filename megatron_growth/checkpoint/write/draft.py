"""A growth that is ready to be written: what goes where. Nothing is written before `writer.grow`.

`copy` gives every place bytes of its own. The other modes take over the base's files and write only
what differs; places with the same bytes share them. All give exactly what the view gives at load.
"""

import json
from pathlib import Path
from typing import Any, Literal

from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint.common_state import grown_common_state
from megatron_growth.checkpoint.durable import write_safely
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import COMMON_FILE, SourceCheckpoint
from megatron_growth.checkpoint.units import index_of
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.checkpoint.write.contents import contents_of
from megatron_growth.checkpoint.write.data_files import (
    DataFile,
    FileIndex,
    data_files,
    index_path,
    write_data_file,
)
from megatron_growth.checkpoint.write.metadata import MetadataBuilder
from megatron_growth.checkpoint.write.placing import place, placed_name
from megatron_growth.checkpoint.write.records import RecordBuffer
from megatron_growth.checkpoint.write.site import Site
from megatron_growth.checkpoint.write.source_files import INTEGRITY, SourceFiles, sha256_of
from megatron_growth.config import GrowthConfig
from megatron_growth.errors import CheckpointError

Mode = Literal["copy", "link", "reflink", "symlink"]

# Files of a checkpoint that hold no tensors: those taken along as they are, and those made anew.
_CARRIED = ("metadata.json",)
_MADE_ANEW = (".metadata", COMMON_FILE, INTEGRITY)


class Draft:
    """A growth that is ready to be written; nothing has been yet.

    Args:
        base: the base's `iter_*` directory.
        growth: what to grow.
        mode: how to write it.
        given: the base as the user named it, for the manifest.

    Attributes:
        files: data files to be written.
        placed: the base's data files that are taken over, by name, with their sizes.
        left_out: other files beside the base's data, which are not taken along.
    """

    def __init__(
        self, base: Path, growth: GrowthConfig, mode: Mode, given: Path | None = None
    ) -> None:
        self.mode = mode
        self.apart = mode == "copy"
        self.source = SourceCheckpoint(base, weights_only=growth.optimizer == "reset")
        self.plan = plan_for(self.source, growth)
        self.view = GrownView(self.source, self.plan)
        self.sources = SourceFiles(self.source)
        contents = contents_of(self.view, placed=not self.apart)
        self._placed_contents = [] if self.apart else [c for c in contents if c.record]
        written = contents if self.apart else [c for c in contents if not c.record]
        self.files = data_files(self.view, written, apart=self.apart)
        storage = self.source.metadata.storage_data
        names = {storage[content.record].relative_path for content in self._placed_contents}
        self.placed = {name: self.sources.state[name][0] for name in sorted(names)}
        known = {*self.sources.state, *_CARRIED, *_MADE_ANEW}
        self.left_out = sorted(path.name for path in base.iterdir() if path.name not in known)
        self.manifest = manifest.describe(self.source, given or base.parent, growth, self.plan)

    @property
    def nbytes(self) -> int:
        """To be written, about."""
        return sum(file.nbytes for file in self.files)

    @property
    def job(self) -> dict[str, Any]:
        """What must be the same for an interrupted growth to go on."""
        return {
            "plan": self.plan.fingerprint,
            "noise_stream_version": self.manifest["noise_stream_version"],
            "base": self.manifest["base_fingerprint"],
            "mode": self.mode,
            "source_files": {name: list(state) for name, state in self.sources.state.items()},
        }

    def site(self, save: Path) -> Site:
        """Where it is written."""
        if save.resolve() in (
            self.source.directory.resolve(),
            self.source.directory.parent.resolve(),
        ):
            raise CheckpointError(
                f"--save {str(save)!r} is the base's own directory, which is never written to; "
                "give another"
            )
        return Site(save, self.source.directory.name, self.job)

    def read_names(self) -> list[str]:
        """The base's data files that are read."""
        storage = self.source.metadata.storage_data
        units = [unit for file in self.files for unit in file.units]
        records = {index_of(chunk) for unit in units for chunk in unit.chunks}
        records |= {c.record for unit in units for c in unit.items if c.record}
        return sorted({storage[record].relative_path for record in records})

    def place(self, directory: Path) -> None:
        """Take over the base's files."""
        assert self.mode != "copy"
        for name in self.placed:
            place(self.source.directory / name, directory / placed_name(name), self.mode)

    def write(self, file: DataFile, directory: Path) -> None:
        """Write one data file, unless an earlier start has."""
        if FileIndex.load(index_path(directory, file.name)) is None:
            write_data_file(self.view, self.sources, file, directory, apart=self.apart)

    def finish(self, directory: Path) -> list[FileIndex]:
        """Write what stands beside the data files.

        Returns:
            What was written, for each data file.
        """
        builder = MetadataBuilder(self.view)
        builder.add_placed(self._placed_contents)
        indices = []
        for file in self.files:
            index = FileIndex.load(index_path(directory, file.name))
            assert index is not None
            builder.add_written(file, index, apart=self.apart)
            indices.append(index)
        builder.write(directory)
        self._write_small_files(directory)
        if self.sources.hashes:
            self._write_integrity(directory, indices)
        return indices

    def _write_small_files(self, directory: Path) -> None:
        for name in _CARRIED:
            if (original := self.source.directory / name).is_file():
                write_safely(directory / name, original.read_bytes())
        if (self.source.directory / COMMON_FILE).is_file():
            state = grown_common_state(self.source.common_state or {}, self.plan)
            write_safely(directory / COMMON_FILE, bytes(RecordBuffer().save(state)))

    def _write_integrity(self, directory: Path, indices: list[FileIndex]) -> None:
        """Megatron's own manifest, as the base has one; sums of placed files are the base's."""
        sums = {placed_name(name): self.sources.hashes[name] for name in self.placed}
        sums |= {
            file.name: i.sha256 for file, i in zip(self.files, indices, strict=True) if i.sha256
        }
        for name in (*_CARRIED, *_MADE_ANEW):
            if name != INTEGRITY and (directory / name).is_file():
                sums[name] = sha256_of(directory / name)
        content = {"algorithm": "sha256", "files": sums}
        write_safely(directory / INTEGRITY, json.dumps(content, indent=2))
