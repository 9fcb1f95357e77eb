"""Loading at growth on load, against a plain load of the same grown model written out.

    python -m benchmarks.load_time [--out benchmarks/results] [--folder DIR]

Each rank is a process that loads its experts (expert parallelism over all ranks) and every other
tensor, weights and three optimizer states, with `torch.distributed.checkpoint.load`, as Megatron's
load strategy calls it on each rank. Memory is there and was touched before. *Cold* means that the
page cache was told to forget the files. Wall time is the slowest rank's; the roads take turns, and
the figures are medians.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import StorageReader

from benchmarks.bases import DISTRIBUTED, Geometry, make
from benchmarks.load_planning import machine, versions
from megatron_growth import GrowthConfig, GrowthStorageReader
from megatron_growth.checkpoint.source import iteration_directory
from megatron_growth.checkpoint.write import Crew, Draft, grow

BASE = Geometry(layers=4, experts=8, hidden=1024, ffn=768, vocab=8192, states=DISTRIBUTED)
GROWTH = GrowthConfig.model_validate({"depth": {"factor": 2}, "width": {"factor": 2}})
ROADS = ("plain", "growth")
RANKS = (1, 2, 4)
ROUNDS = 3


class _Boxes:
    """A rank's part of a tensor: one box of each (layer, expert), or the whole."""

    def __init__(self, entry: TensorStorageMetadata, boxes: list[ChunkStorageMetadata]) -> None:
        self._size = entry.size
        self._memory = {
            box.offsets: torch.zeros(box.sizes, dtype=entry.properties.dtype) for box in boxes
        }

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self._memory.values())

    def size(self) -> torch.Size:
        return self._size

    def at(self, offsets: torch.Size) -> torch.Tensor:
        return self._memory[offsets]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(at, memory.size()) for at, memory in self._memory.items()]


class _Planner(dcp.DefaultLoadPlanner):
    """DCP's, over boxes."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.state_dict[index.fqn].at(index.offset)


def _wanted(metadata: Metadata, rank: int, ranks: int) -> dict[str, _Boxes]:
    return {
        key: _Boxes(entry, list(_boxes(key, entry.size, rank, ranks)))
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _boxes(key: str, size: torch.Size, rank: int, ranks: int) -> Iterator[ChunkStorageMetadata]:
    if ".experts." not in key:
        yield ChunkStorageMetadata(torch.Size((0,) * len(size)), size)
        return
    layers, experts, *rest = size
    for layer in range(layers):
        for expert in range(rank * experts // ranks, (rank + 1) * experts // ranks):
            yield ChunkStorageMetadata(
                torch.Size((layer, expert, *(0 for _ in rest))), torch.Size((1, 1, *rest))
            )


def _reader(road: str, base: Path, grown: Path) -> StorageReader:
    return GrowthStorageReader(base, GROWTH) if road == "growth" else dcp.FileSystemReader(grown)


def _rank(
    rank: int, ranks: int, base: Path, grown: Path, barrier: Barrier, results: "Queue[Any]"
) -> None:
    torch.set_num_threads(1)
    state = _wanted(_reader("growth", base, grown).read_metadata(), rank, ranks)
    nbytes = sum(boxes.nbytes for boxes in state.values())
    for number in range(ROUNDS + 1):
        for cache in ("cold", "warm"):
            for road in ROADS:
                if rank == 0:
                    _prepare(base if road == "growth" else grown, cache)
                barrier.wait()
                start, worked = time.perf_counter(), time.process_time()
                planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
                dcp.load(
                    dict(state),
                    storage_reader=_reader(road, base, grown),
                    planner=planner,
                    no_dist=True,
                )
                wall, cpu = time.perf_counter() - start, time.process_time() - worked
                barrier.wait()
                if number:  # the first round compiles, and imports
                    results.put((road, cache, number, rank, wall, cpu, nbytes))


def _prepare(directory: Path, cache: str) -> None:
    for path in directory.glob("*.distcp"):
        with open(path, "rb") as stream:
            if cache == "cold":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(8 << 20):
                    pass


def measure(ranks: int, base: Path, grown: Path) -> list[dict[str, Any]]:
    """Both roads with so many ranks, cold and warm."""
    context = get_context("spawn")
    barrier, results = context.Barrier(ranks), context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, base, grown, barrier, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in range(ranks * ROUNDS * 2 * len(ROADS))]
    for process in processes:
        process.join()
    rows = []
    for cache in ("cold", "warm"):
        for road in ROADS:
            mine = [r for r in found if r[:2] == (road, cache)]
            rounds = [[r for r in mine if r[2] == n] for n in range(1, ROUNDS + 1)]
            rows.append({
                "ranks": ranks,
                "cache": cache,
                "load": road,
                "wall_s": statistics.median(max(r[4] for r in each) for each in rounds),
                "cpu_s": statistics.median(sum(r[5] for r in each) for each in rounds),
                "bytes": sum(r[6] for r in rounds[0]),
            })  # fmt: skip
    return rows


def main() -> None:
    """Make the checkpoints, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--folder", type=Path, help="for the checkpoints, some 4 GiB; kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        base = iteration_directory(make(folder / "base", BASE))
        if not (folder / "grown").exists():
            with Crew() as crew:
                grow(Draft(base, GROWTH, "copy"), folder / "grown", crew=crew)
        grown = iteration_directory(folder / "grown")
        rows = [row for ranks in RANKS for row in measure(ranks, base, grown)]
    table = Table("ranks", "page cache", "load", "wall s", "CPU s", "GiB", "GiB/s",
                  title="Loading the grown model")  # fmt: skip
    for row in rows:
        gib = row["bytes"] / 2**30
        table.add_row(
            str(row["ranks"]), row["cache"], row["load"], f"{row['wall_s']:.2f}",
            f"{row['cpu_s']:.2f}", f"{gib:.2f}", f"{gib / row['wall_s']:.2f}",
        )  # fmt: skip
    Console(width=100).print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "rounds": ROUNDS,
        "rows": rows,
    }
    (arguments.out / "load_time.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
