"""Who writes which data file: this process, several on this machine, or all ranks of a torchrun.

Files are dealt out by bytes. Nobody talks while writing; at the end of each step all ranks tell
each other whether it worked, so that one that failed fails all of them, with its message.
"""

import heapq
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection

import torch

from megatron_growth.errors import CheckpointError, GrowthError

_LONGEST = timedelta(days=7)  # that one rank waits for the others; torchrun ends all when one dies


class Crew:
    """The processes that write a checkpoint together.

    Args:
        workers: processes on each rank.

    Attributes:
        is_first: whether this rank makes the directory, writes the metadata and speaks.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        launched = torch.distributed.is_torchelastic_launched()  # else the variables are another's
        self._world = int(os.environ["WORLD_SIZE"]) if launched else 1
        self._rank = int(os.environ["RANK"]) if launched else 0
        self.is_first = self._rank == 0
        self._made_group = False

    def __enter__(self) -> "Crew":
        if self._world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=_LONGEST)
            self._made_group = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._made_group:
            torch.distributed.destroy_process_group()

    def together[Result](self, step: Callable[[], Result]) -> Result:
        """Do a step on every rank and go on when all have done it.

        Raises:
            GrowthError: it failed on some rank; the same error on every rank.
        """
        if self._world == 1:
            return step()
        result, failure = None, None
        try:
            result = step()
        except GrowthError as error:
            failure = error
        failures: list[GrowthError | None] = [None] * self._world
        torch.distributed.all_gather_object(failures, failure)
        for rank, found in enumerate(failures):
            if found is not None:
                alone = sum(other is not None for other in failures) < self._world
                raise type(found)(f"{found} (rank {rank})" if alone else str(found))
        return result  # type: ignore[return-value]

    def first[Result](self, step: Callable[[], Result]) -> Result | None:
        """Do a step on the first rank alone; the others wait for it."""
        return self.together(step if self.is_first else lambda: None)  # type: ignore[arg-type, return-value]

    def each[Job](
        self, jobs: Sequence[Job], weight: Callable[[Job], int], work: Callable[[Job], None]
    ) -> None:
        """Do every job once, on some process of some rank.

        Args:
            jobs: the same on every rank.
            weight: what a job costs, in bytes.
            work: does one.
        """
        lanes = dealt(jobs, weight, self._world * self.workers)
        mine = lanes[self._rank * self.workers : (self._rank + 1) * self.workers]
        self.together(lambda: _in_processes([lane for lane in mine if lane], work))


def dealt[Job](
    jobs: Sequence[Job], weight: Callable[[Job], int], num_lanes: int
) -> list[list[Job]]:
    """Jobs dealt out so that the lanes weigh about the same, heaviest first; each lane keeps the
    jobs' order."""
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    loads = [(0, lane) for lane in range(num_lanes)]
    for number in sorted(range(len(jobs)), key=lambda n: (-weight(jobs[n]), n)):
        load, lane = heapq.heappop(loads)
        lanes[lane].append(number)
        heapq.heappush(loads, (load + weight(jobs[number]), lane))
    return [[jobs[number] for number in sorted(lane)] for lane in lanes]


def _in_processes[Job](lanes: Sequence[Sequence[Job]], work: Callable[[Job], None]) -> None:
    """Each lane in a process of its own; a single one in this process."""
    if len(lanes) <= 1:
        with _one_thread():
            for job in lanes[0] if lanes else ():
                work(job)
        return
    # Forked, so that the plan need not be made again, and so that the lock on the target is held
    # until the last of them has ended.
    context = multiprocessing.get_context("fork")
    running = []
    for lane in lanes:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_lane, args=(lane, work, theirs, os.getpid()))
        process.start()
        theirs.close()
        running.append((process, ours))
    try:
        for process, said in running:
            failure = _last_word(said)
            process.join()
            if failure is not None:
                raise failure
            if process.exitcode:
                raise CheckpointError(
                    f"a worker ended with exit code {process.exitcode} (a negative one is a "
                    "signal; -9 often means out of memory); go on with --resume and fewer --workers"
                )
    finally:
        for process, _ in running:
            process.terminate()
            process.join()


def _last_word(said: Connection) -> GrowthError | None:
    try:
        failure: GrowthError | None = said.recv()
    except EOFError:
        return None
    return failure


def _lane[Job](
    lane: Sequence[Job], work: Callable[[Job], None], tell: Connection, parent: int
) -> None:
    torch.set_num_threads(
        1
    )  # the lanes fill the cores; and a pool of threads does not outlive a fork
    try:
        for job in lane:
            if os.getppid() != parent:  # killed: nobody would publish this
                return
            work(job)
    except GrowthError as error:
        tell.send(error)
    except KeyboardInterrupt:
        pass  # the parent speaks
    except Exception as error:
        line = " ".join(str(error).split())
        tell.send(
            CheckpointError(
                f"a worker failed ({type(error).__name__}: {line}); go on with --resume and fewer "
                "--workers"
            )
        )
    tell.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch inside: blocks are small, and a pool that waits for a core is many times
    slower. Nor would a pool outlive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
