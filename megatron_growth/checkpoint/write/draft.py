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
from megatron_growth.checkpoint.write.contents import Content, contents_of
from megatron_growth.checkpoint.write.data_files import (
    DataFile,
    FileIndex,
    data_files,
    write_data_file,
)
from megatron_growth.checkpoint.write.metadata import MetadataBuilder
from megatron_growth.checkpoint.write.placing import place, placed_name
from megatron_growth.checkpoint.write.records import RecordBuffer
from megatron_growth.checkpoint.write.site import Site
from megatron_growth.checkpoint.write.source_files import INTEGRITY, SourceFiles, sha256_of
from megatron_growth.config import ContinueConfig, GrowthConfig
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.build import router_growth
from megatron_growth.planning.router import read_router

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
        settings: how a run would go on, which a written checkpoint cannot say.

    Attributes:
        files: data files to be written.
        placed: the base's data files that are taken over, by name, with their sizes.
        left_out: other files beside the base's data, which are not taken along.
        notes: what the user should know.

    Raises:
        CheckpointError: the base is missing, damaged or of a format that cannot be grown.
        PlanError: it cannot grow that way.
    """

    def __init__(
        self,
        base: Path,
        growth: GrowthConfig,
        mode: Mode,
        given: Path | None = None,
        settings: ContinueConfig | None = None,
    ) -> None:
        self.mode = mode
        self.apart = mode == "copy"
        self.source = SourceCheckpoint(base, weights_only=growth.optimizer == "reset")
        self.plan = plan_for(self.source, growth)
        self.view = GrownView(self.source, self.plan)
        self.sources = SourceFiles(self.source)
        try:
            self._cut(contents_of(self.view, placed=not self.apart))
        except KeyError as missing:
            raise CheckpointError(
                f"the .metadata of {str(base)!r} says of no file where {missing} lies; it is "
                "damaged: use another iteration"
            ) from None
        known = {*self.sources.state, *_CARRIED, *_MADE_ANEW}
        self.left_out = sorted(path.name for path in base.iterdir() if path.name not in known)
        self.manifest = manifest.describe(self.source, given or base.parent, growth, self.plan)
        self.notes = _notes(self.source, growth, settings)

    def _cut(self, contents: list[Content]) -> None:
        """What is written, and what stays where it is."""
        self._placed_contents = [] if self.apart else [c for c in contents if c.record]
        written = contents if self.apart else [c for c in contents if not c.record]
        self.files = data_files(self.view, written, apart=self.apart)
        storage = self.source.metadata.storage_data
        names = {storage[content.record].relative_path for content in self._placed_contents}
        self.placed = {name: self.sources.state[name][0] for name in sorted(names)}

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
            "data_files": [file.nbytes for file in self.files],
            "version": self.manifest["versions"]["megatron-growth"],
            "source_files": {name: list(state) for name, state in self.sources.state.items()},
        }

    def site(self, save: Path) -> Site:
        """Where it is written."""
        base = self.source.directory.resolve().parent
        if save.resolve().is_relative_to(base):
            raise CheckpointError(
                f"--save {str(save)!r} is the base's own directory or in it, which is never "
                "written to; give another"
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
        if FileIndex.of_finished(directory, file.name) is None:
            write_data_file(self.view, self.sources, file, directory, apart=self.apart)

    def finish(self, directory: Path) -> dict[str, FileIndex]:
        """Write what stands beside the data files; the index of each of those."""
        builder = MetadataBuilder(self.view)
        builder.add_placed(self._placed_contents)
        indices: dict[str, FileIndex] = {}
        for file in self.files:
            index = FileIndex.of_finished(directory, file.name)
            if index is None:
                raise CheckpointError(
                    f"{str(directory / file.name)!r} is not as it was written: something else has "
                    "changed it; go on with --resume, which writes it again"
                )
            builder.add_written(file, index, apart=self.apart)
            indices[file.name] = index
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

    def _write_integrity(self, directory: Path, indices: dict[str, FileIndex]) -> None:
        """Megatron's own manifest, as the base has one; sums of placed files are the base's."""
        sums = {placed_name(name): self.sources.hashes[name] for name in self.placed}
        for name, index in indices.items():
            assert index.sha256 is not None
            sums[name] = index.sha256
        for name in (*_CARRIED, *_MADE_ANEW):
            if name != INTEGRITY and (directory / name).is_file():
                sums[name] = sha256_of(directory / name)
        content = {"algorithm": "sha256", "files": sums}
        write_safely(directory / INTEGRITY, json.dumps(content, indent=2))


def _notes(
    source: SourceCheckpoint, growth: GrowthConfig, settings: ContinueConfig | None
) -> tuple[str, ...]:
    """What the router's rules say, and what of the configuration has no effect here."""
    router = router_growth(growth, source.architecture, read_router(source.args))
    notes = [f"{note.severity}: {note.text}" for note in router.notes] if router else []
    if settings not in (None, ContinueConfig()):
        notes.append(
            "warning: `continue:` is for a run that grows while it loads; what is written keeps "
            "the base's iteration, data position and schedule"
        )
    return tuple(notes)
