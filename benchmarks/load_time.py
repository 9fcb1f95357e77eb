"""Loading at growth on load, against a plain load of the same grown model written out; both through
Megatron.

    python -m benchmarks.load_time [--rounds 3] [--out benchmarks/results]

Megatron trains a base for one step and saves it; the grown checkpoint is written by copy. Then runs
that load and stop, by turns from one and the other, on 1, 2 and 4 ranks (experts parallel over all
of them). Timed is Megatron's own `load_checkpoint`, optimizer included, and for growth what comes
before it as well: opening the base, and planning. *Cold* means that the page cache was told to
forget the files. A time is the slowest rank's, a figure the median of the rounds.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.about import about
from tests.megatron.driver import Job, Probe, Result, run_jobs
from tests.megatron.test_continuation import changed
from tests.megatron.test_cpu_backend import MODEL, NO_DROPOUT
from tests.megatron.test_growth import config_file

RANKS = (1, 2, 4)
ROADS = ("plain", "growth")
CACHES = ("cold", "warm")
GROWTH = {"depth": {"factor": 2}, "width": {"factor": 2}, "optimizer": "rescale"}

_SIZES = {"hidden_size": "512", "moe_ffn_hidden_size": "1024", "num_experts": "8"}
_GROWN = {"num_layers": "8", "num_experts": "16", "moe_router_topk": "4"}
_seconds: list[float] = []  # of the job that runs; a rank runs one after the other


# -- in the ranks ----------------------------------------------------------------------------------


@contextmanager
def timed(options: Mapping[str, Any]) -> Iterator[None]:
    """Time the load of one job, its files forgotten or read just before."""
    import torch
    from megatron.training import training

    from megatron_growth.training import start

    if os.environ["RANK"] == "0":
        for path in Path(options["reads"]).rglob("*.distcp"):
            _prepare(path, options["cache"])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    _seconds.clear()
    originals = training.load_checkpoint, start.decide
    training.load_checkpoint, start.decide = map(_timed, originals)
    try:
        yield
    finally:
        training.load_checkpoint, start.decide = originals


def _timed(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            _seconds.append(time.monotonic() - begin)

    return call


def _prepare(path: Path, cache: str) -> None:
    with path.open("rb", buffering=0) as file:
        if cache == "cold":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            buffer = bytearray(8 << 20)
            while file.readinto(buffer):
                pass


def seconds(probe: Probe) -> float:
    """What this rank's load took."""
    return sum(_seconds)


# -- here ------------------------------------------------------------------------------------------


def measure(ranks: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """One row for each cache and road."""
    folder.mkdir()
    base, grown = folder / "base", folder / "grown"
    layout = ["--bf16", "--expert-model-parallel-size", str(ranks)]
    once = changed([*MODEL, *NO_DROPOUT, *layout], train_iters="1", lr_decay_iters=None,
                   lr_decay_style="constant", lr_warmup_iters="0", **_SIZES)  # fmt: skip
    growth = config_file(folder / "growth.yaml", base, GROWTH)
    roads = {
        "plain": (changed(once, load=str(grown), **_GROWN), grown),
        "growth": (["--growth-config", growth, *once_without_model(once)], base),
    }
    jobs = [
        Job("base", [*once, "--save", str(base), "--save-interval", "1"]),
        Job("grown", roads["plain"][0], contexts=("tests.megatron.probes:written_first",),
            options={"base": str(base), "growth": GROWTH, "mode": "copy", "written": str(grown)}),
    ]  # fmt: skip
    for number in range(rounds):
        for cache in CACHES:
            for road, (argv, reads) in roads.items():
                jobs.append(
                    Job(
                        f"{road} {cache} {number}",
                        argv,
                        contexts=("benchmarks.load_time:timed",),
                        after_setup="benchmarks.load_time:seconds",
                        options={"cache": cache, "reads": str(reads)},
                    )
                )
    runs = run_jobs(ranks, jobs, timeout=1800)
    return [
        _row(runs, ranks, cache, road, rounds) | {"on_disk_mib": _size(roads[road][1]) / (1 << 20)}
        for cache in CACHES
        for road in ROADS
    ]


def _row(
    runs: Mapping[str, Result], ranks: int, cache: str, road: str, rounds: int
) -> dict[str, Any]:
    """Medians over the rounds; ratios are of loads in the same round."""
    own = [max(runs[name].after_setup) for name in _names(road, cache, rounds)]
    plain = [max(runs[name].after_setup) for name in _names("plain", cache, rounds)]
    ratios = (mine / other for mine, other in zip(own, plain, strict=True))
    return {
        "ranks": ranks,
        "cache": cache,
        "load": road,
        "seconds": statistics.median(own),
        "to_plain": statistics.median(ratios),
    }


def once_without_model(argv: list[str]) -> list[str]:
    """What a grown run must be told: the architecture is the base's, grown."""
    return changed(argv, num_layers=None, num_experts=None, moe_router_topk=None)


def _names(road: str, cache: str, rounds: int) -> list[str]:
    return [f"{road} {cache} {number}" for number in range(rounds)]


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.distcp"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    own = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as name:
            rows += measure(ranks, own.rounds, Path(name) / "run")
    table = Table(*(column.replace("_", " ") for column in rows[0]), title="Loading a grown model")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else f"{v}" for v in row.values()))
    Console(width=100).print(table)
    own.out.mkdir(parents=True, exist_ok=True)
    record = {**about(), "rounds": own.rounds, "rows": rows}
    (own.out / "load_time.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
