"""Write the grown checkpoint of a base: the view, as files.

    draft -> checks -> data files, and the base's own -> metadata -> rename -> tracker

One process or many: each step is done by all ranks together, and an error of one is everyone's.
"""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_growth.checkpoint.durable import sync_directory
from megatron_growth.checkpoint.write.checks import BaseChecks
from megatron_growth.checkpoint.write.crew import Crew
from megatron_growth.checkpoint.write.data_files import DataFile, FileIndex
from megatron_growth.checkpoint.write.draft import Draft, Mode
from megatron_growth.checkpoint.write.site import Site
from megatron_growth.errors import CheckpointError

Progress = Callable[[int, int], None]  # bytes written so far, and in all

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Written:
    """A grown checkpoint that was written.

    Attributes:
        directory: its `iter_*` directory.
        mode: how.
        read: bytes read from the base, checks not counted.
        written: bytes of the data files; like what was read, without those of an earlier start.
        placed: bytes of the base's files that were taken over.
        num_written: data files.
        num_placed: files taken over.
        seconds: that it took.
        peak_memory: largest resident set of any process, bytes.
        left_out: files beside the base's data that were not taken along.
        weights_only: it holds no optimizer state.
        notes: what the user should know.
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
    notes: tuple[str, ...]


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
            the sums in its records, and its masters. Files that are read are checked anyway where
            there is a manifest.
        on_progress: called now and then, on the first rank.

    Returns:
        What was written, on the first rank; None on the others.

    Raises:
        CheckpointError: the base is damaged or changed, `save` is not free, or storage fails. The
            base is untouched, and `save` is no checkpoint.
    """
    start = time.monotonic()
    try:
        with draft.site(save) as site:
            earlier = crew.first(lambda: _begin(draft, site, resume))
            if not site.is_published:
                _work(draft, site, crew, checksum, on_progress)
            return crew.first(lambda: _end(draft, site, start, earlier or frozenset()))
    except KeyboardInterrupt:
        raise CheckpointError(
            "interrupted; the base is untouched and no checkpoint was made: go on with --resume"
        ) from None
    finally:
        draft.sources.close()


def _begin(draft: Draft, site: Site, resume: bool) -> frozenset[str]:
    """Make ready; which data files an earlier start has finished."""
    with _one_line(site.save):
        site.open(resume=resume)
        if site.is_published:
            return frozenset(file.name for file in draft.files)
        site.check_space(draft.nbytes)
        if draft.placed:
            try:
                draft.place(site.work)
            except CheckpointError:
                site.discard()  # another mode is to find the way free
                raise
    found = (f.name for f in draft.files if FileIndex.of_finished(site.work, f.name))
    return frozenset(found)


def _work(draft: Draft, site: Site, crew: Crew, checksum: bool, on_progress: Progress) -> None:
    names = list(draft.sources.state) if checksum else []
    if draft.sources.hashes and not checksum:
        names = draft.read_names()
    size = {name: state[0] for name, state in draft.sources.state.items()}
    checks = BaseChecks(draft.view, draft.sources)
    crew.each(names, size.__getitem__, checks.check)
    with _watched(site.work, draft.nbytes, on_progress, crew):
        crew.each(draft.files, lambda file: file.nbytes, partial(_write, draft, site.work))


def _write(draft: Draft, directory: Path, file: DataFile) -> None:
    with _one_line(directory):
        draft.write(file, directory)


def _end(draft: Draft, site: Site, start: float, earlier: frozenset[str]) -> Written:
    indices: dict[str, FileIndex] = {}
    with _one_line(site.save):
        if not site.is_published:
            indices = draft.finish(site.work)
            draft.sources.check_all()
            sync_directory(site.work)
        site.publish(draft.manifest)
    now = [index for name, index in indices.items() if name not in earlier]
    return Written(
        directory=site.final,
        mode=draft.mode,
        read=sum(index.read for index in now),
        written=sum(index.written for index in now),
        placed=sum(draft.placed.values()),
        num_written=len(now),
        num_placed=len(draft.placed),
        seconds=time.monotonic() - start,
        peak_memory=peak_memory(),
        left_out=tuple(draft.left_out),
        weights_only=not any(t.key.state for t in draft.source.tensors.values()),
        notes=(*draft.notes, *site.notes),
    )


def peak_memory() -> int:
    """The largest resident set of this process or a worker of its, bytes. Not `ru_maxrss` of this
    one, which a process inherits of whoever started it."""
    status = Path("/proc/self/status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


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
            with suppress(OSError):  # one is renamed just now
                done = sum(path.stat().st_size for path in directory.glob("__*.distcp*[!x]"))
                on_progress(min(done, total), total)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    on_progress(total, total)
