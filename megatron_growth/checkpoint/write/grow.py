"""Write the grown checkpoint of a base: the view, as files.

    view -> contents -> data files, or the base's own -> metadata -> rename -> tracker

`copy` gives every place bytes of its own. The other modes take over the base's files and write only
what differs; places with the same bytes share them. All give exactly what the view gives at load.
"""

import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_growth.checkpoint import manifest
from megatron_growth.checkpoint.common_state import grown_common_state
from megatron_growth.checkpoint.durable import sync_directory, write_safely
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import COMMON_FILE, SourceCheckpoint
from megatron_growth.checkpoint.units import index_of
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.checkpoint.write.contents import contents_of
from megatron_growth.checkpoint.write.crew import Crew
from megatron_growth.checkpoint.write.data_files import (
    DataFile,
    FileIndex,
    data_files,
    index_path,
    write_data_file,
)
from megatron_growth.checkpoint.write.metadata import MetadataBuilder
from megatron_growth.checkpoint.write.placing import Placing, place, placed_name
from megatron_growth.checkpoint.write.records import RecordBuffer, check_records
from megatron_growth.checkpoint.write.site import Site
from megatron_growth.checkpoint.write.source_files import INTEGRITY, SourceFiles, sha256_of
from megatron_growth.config import GrowthConfig
from megatron_growth.errors import CheckpointError

Mode = Literal["copy"] | Placing
Progress = Callable[[int, int], None]  # bytes written so far, and in all

# Files of a checkpoint that hold no tensors: those taken along as they are, and those made anew.
_CARRIED = ("metadata.json",)
_MADE_ANEW = (".metadata", COMMON_FILE, INTEGRITY)
_POLL_SECONDS = 0.5


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
        contents = contents_of(self.view)
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
            with _one_line(directory):
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
        """Megatron's own manifest, as the base has one: the sums of placed files are the base's."""
        sums = {placed_name(name): self.sources.hashes[name] for name in self.placed}
        sums |= {
            file.name: i.sha256 for file, i in zip(self.files, indices, strict=True) if i.sha256
        }
        for name in (*_CARRIED, *_MADE_ANEW):
            if name != INTEGRITY and (directory / name).is_file():
                sums[name] = sha256_of(directory / name)
        content = {"algorithm": "sha256", "files": sums}
        write_safely(directory / INTEGRITY, json.dumps(content, indent=2))


@dataclass(frozen=True)
class Written:
    """A grown checkpoint that was written.

    Attributes:
        directory: its `iter_*` directory.
        mode: how.
        read: bytes read from the base, checks not counted.
        written: bytes of the data files.
        placed: bytes of the base's files that were taken over.
        num_written: data files.
        num_placed: files taken over.
        seconds: that it took.
        peak_memory: largest resident set of any process, bytes.
        left_out: files beside the base's data that were not taken along.
        weights_only: it holds no optimizer state.
    """

    directory: Path
    mode: Mode
    read: int
    written: int
    placed: int
    num_written: int
    num_placed: int
    seconds: float
    peak_memory: int
    left_out: tuple[str, ...]
    weights_only: bool


def grow(
    draft: Draft,
    save: Path,
    *,
    crew: Crew,
    resume: bool = False,
    checksum: bool = False,
    on_progress: Progress = lambda done, total: None,
) -> Written | None:
    """Write a growth; `save` becomes a Megatron checkpoint directory.

    Args:
        draft: what to write; the same on every rank.
        save: made where missing; must hold no checkpoint.
        crew: who writes.
        resume: go on with an interrupted growth.
        checksum: check every data file of the base first, by Megatron's integrity manifest or by
            the sums in its records. Files that are read are checked anyway where there is a
            manifest.
        on_progress: called now and then, on the first rank.

    Returns:
        What was written, on the first rank; None on the others.

    Raises:
        CheckpointError: the base is damaged or changed, `save` is not free, or storage fails. The
            base is untouched, and `save` is no checkpoint.
    """
    start = time.monotonic()
    with draft.site(save) as site:
        crew.first(lambda: _begin(draft, site, resume))
        if not site.is_published:
            names = list(draft.sources.state) if checksum else []
            if draft.sources.hashes and not checksum:
                names = draft.read_names()
            size = {name: state[0] for name, state in draft.sources.state.items()}
            crew.each(names, size.__getitem__, partial(_check, draft))
            with _watched(site.work, draft.nbytes, on_progress, crew):
                crew.each(draft.files, lambda f: f.nbytes, lambda f: draft.write(f, site.work))
        return crew.first(lambda: _end(draft, site, start))


def _begin(draft: Draft, site: Site, resume: bool) -> None:
    with _one_line(site.save):
        site.open(resume=resume)
        if not site.is_published:
            site.check_space(draft.nbytes)
            if draft.placed:
                draft.place(site.work)


def _check(draft: Draft, name: str) -> None:
    """Whether a data file of the base is what was saved."""
    if draft.sources.hashes:
        draft.sources.check_hash(name)
    else:
        check_records(draft.view, draft.sources, name)


def _end(draft: Draft, site: Site, start: float) -> Written:
    indices: list[FileIndex] = []
    with _one_line(site.save):
        if not site.is_published:
            indices = draft.finish(site.work)
            draft.sources.check_unchanged()
            sync_directory(site.work)
        site.publish(draft.manifest)
    return Written(
        directory=site.final,
        mode=draft.mode,
        read=sum(index.read for index in indices),
        written=sum(index.written for index in indices),
        placed=sum(draft.placed.values()),
        num_written=len(draft.files),
        num_placed=len(draft.placed),
        seconds=time.monotonic() - start,
        peak_memory=1024
        * max(
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ),
        left_out=tuple(draft.left_out),
        weights_only=not any(t.key.state for t in draft.source.tensors.values()),
    )


@contextmanager
def _one_line(directory: Path) -> Iterator[None]:
    """The operating system's refusals as errors that say what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{str(directory)!r} cannot be written to ({error.strerror}); the base is untouched "
            "and no checkpoint was made: put it right and go on with --resume"
        ) from None


@contextmanager
def _watched(directory: Path, total: int, on_progress: Progress, crew: Crew) -> Iterator[None]:
    """Tell the progress while inside. What has been written is read off the directory, for other
    processes and machines write there too."""
    if not crew.is_first:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            sizes = [path.stat().st_size for path in directory.glob("__*.distcp")]
            on_progress(min(sum(sizes), total), total)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    on_progress(total, total)
