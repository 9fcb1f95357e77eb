"""What writing a grown checkpoint costs, against what the disk can do.

    python -m benchmarks.growing [--rounds 5] [--reference CHECKOUT] [--out benchmarks/results]

    copy     depth x 2 and width x 2 of a 2 GiB base: against reading its bytes and writing the
             grown checkpoint's with the same buffered I/O (the limit), and against the operators of
             the paper's authors as one would run them (torch.load, depth, width, torch.save), if a
             checkout of github.com/Mr-Philo/Orthogonal-Model-Growth is given
    link     depth x 2 by the number of chunks, and by their size
    memory   copy by the size of the base

Every measurement is a process of its own, its caches dropped; those to be compared take turns, and
a ratio is the median of the rounds' ratios. docs/performance.md explains the tables.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.about import about
from megatron_growth.checkpoint.write.writer import peak_memory

GIB = 1 << 30
BOTH = {"depth": {"factor": 2}, "width": {"factor": 2}}
BLOCK = 8 << 20
SYNC_BYTES = 128 << 20

Measured = dict[str, float]

# layers, experts, hidden, ffn, vocabulary: 2.00 GiB in bf16
TWO_GIB = (6, 16, 1024, 3328, 32000)
# the same layer, more of them: memory must not follow
SIZES = {0.5: (1, 16, 1024, 3328, 32000), 2.0: TWO_GIB, 4.0: (12, 16, 1024, 3328, 32000)}
# layers, experts: chunks of the grown checkpoint, of small experts
CHUNKS = {25_000: (21, 100), 100_000: (83, 100), 1_000_000: (208, 400)}


# -- what is measured, each in a process of its own ------------------------------------------------


def child_copy(base: str, out: str, workers: int) -> Measured:
    from megatron_growth.checkpoint.write import Crew, Draft, grow
    from megatron_growth.config import GrowthConfig

    with _measured() as measured, Crew(workers) as crew:
        draft = Draft(Path(base) / "iter_0000100", GrowthConfig.model_validate(BOTH), "copy")
        written = grow(draft, Path(out), crew=crew)
    assert written is not None
    return {**measured, "read": written.read, "written": written.written}


def child_link(base: str, out: str) -> Measured:
    from megatron_growth.checkpoint.write import Crew, Draft, grow
    from megatron_growth.config import GrowthConfig

    growth = GrowthConfig.model_validate({"depth": {"factor": 2}})
    with _measured() as measured, Crew() as crew:
        draft = Draft(Path(base) / "iter_0000100", growth, "link")
        written = grow(draft, Path(out), crew=crew)
    assert written is not None
    metadata = (written.directory / ".metadata").stat().st_size
    return {**measured, "placed": written.placed, "metadata": metadata}


def child_limit(base: str, out: str, nbytes: int) -> Measured:
    """Read every byte of the base and write as many as the grown checkpoint has."""
    buffer = memoryview(bytearray(BLOCK))
    Path(out).mkdir()
    with _measured() as measured, ThreadPoolExecutor(1) as syncer:
        for path in sorted(Path(base).rglob("*.distcp")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        descriptor = os.open(Path(out) / "data", os.O_WRONLY | os.O_CREAT)
        pending, synced = None, 0
        for done in range(0, nbytes, BLOCK):
            os.write(descriptor, buffer[: min(BLOCK, nbytes - done)])
            if done - synced >= SYNC_BYTES:
                if pending:
                    pending.result()
                synced, pending = done, syncer.submit(os.fdatasync, descriptor)
        os.fsync(descriptor)
        os.close(descriptor)
    return measured


def child_reference(flat: str, out: str, checkout: str, experts: int, hidden: int) -> Measured:
    """The authors' operators, as their demo calls them."""
    import torch

    sys.path.insert(0, str(Path(checkout) / "growth"))
    import algorithm  # type: ignore[import-not-found]

    Path(out).mkdir()
    with _measured() as measured:
        state = torch.load(flat)
        state = algorithm.depth_growth_state_dict(state, growth_factor=2)
        state = algorithm.moe_width_growth_state_dict(
            state, num_experts=experts, hidden_size=hidden, noise_alpha=0.01
        )
        with (Path(out) / "grown.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    return measured


@contextmanager
def _measured() -> Iterator[Measured]:
    """Wall and CPU seconds inside, and the memory before and at its highest."""
    found: Measured = {"memory_before": _resident()}
    start, before = time.monotonic(), _cpu()
    yield found
    found["seconds"] = time.monotonic() - start
    found["cpu_seconds"] = _cpu() - before
    found["memory_peak"] = float(peak_memory())


def _cpu() -> float:
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    usages = [resource.getrusage(who) for who in both]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


CHILDREN: dict[str, Callable[..., Measured]] = {
    "copy": child_copy,
    "link": child_link,
    "limit": child_limit,
    "reference": child_reference,
}


def run_child(name: str, **arguments: Any) -> Measured:
    """One measurement in a new process, with cold caches; what it wrote is removed."""
    for path in Path(arguments.get("base") or Path(arguments["flat"]).parent).rglob("*"):
        if path.is_file():
            _drop_cache(path)
    out = Path(arguments["out"])
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.growing", "--child", name,
             json.dumps(arguments)],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return dict(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _drop_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


# -- the three tables ------------------------------------------------------------------------------


def measure_copy(folder: Path, rounds: int, reference: Path | None) -> list[dict[str, Any]]:
    base, out = _base(folder, TWO_GIB), str(folder / "out")
    first = run_child("copy", base=base, out=out, workers=1)
    ways: dict[str, Callable[[], Measured]] = {
        "limit": lambda: run_child("limit", base=base, out=out, nbytes=int(first["written"])),
        "copy, 1 process": lambda: run_child("copy", base=base, out=out, workers=1),
        "copy, 2 processes": lambda: run_child("copy", base=base, out=out, workers=2),
    }
    if reference:
        flat = str(_flat(folder, TWO_GIB))
        ways["authors' operators"] = lambda: run_child(
            "reference", flat=flat, out=out, checkout=str(reference), experts=TWO_GIB[1],
            hidden=TWO_GIB[2],
        )  # fmt: skip
    taken: dict[str, list[Measured]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(way())
    return [_row(name, taken[name], taken["limit"]) for name in ways]


def _row(name: str, own: list[Measured], limit: list[Measured]) -> dict[str, Any]:
    pairs = list(zip(own, limit, strict=True))
    return {
        "way": name,
        "seconds": statistics.median(m["seconds"] for m in own),
        "of_limit": statistics.median(other["seconds"] / m["seconds"] for m, other in pairs),
        "cpu_seconds": statistics.median(m["cpu_seconds"] for m in own),
        "cpu_to_limit": statistics.median(m["cpu_seconds"] / o["cpu_seconds"] for m, o in pairs),
        "memory_gib": statistics.median(m["memory_peak"] for m in own) / GIB,
        "memory_above_start_gib": statistics.median(
            (m["memory_peak"] - m["memory_before"]) / GIB for m in own
        ),
    }


def measure_link(folder: Path, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for wanted, (layers, experts) in CHUNKS.items():
        for scale in (1, 64) if wanted == 100_000 else (1,):
            base = folder / f"link {wanted} {scale}"
            chunks = _sparse_base(base, layers, experts, scale)
            taken = [
                run_child("link", base=str(base), out=str(folder / "out")) for _ in range(rounds)
            ]
            seconds = statistics.median(m["seconds"] for m in taken)
            rows.append(
                {
                    "chunks": 2 * chunks,
                    "gib": taken[0]["placed"] / GIB,
                    "seconds": seconds,
                    "us_a_chunk": 1e6 * seconds / (2 * chunks),
                    "metadata_mib": taken[0]["metadata"] / (1 << 20),
                    "memory_gib": statistics.median(m["memory_peak"] for m in taken) / GIB,
                }
            )
            shutil.rmtree(base)
    return rows


def measure_memory(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for size, geometry in SIZES.items():
        base = _base(folder, geometry)
        taken = run_child("copy", base=base, out=str(folder / "out"), workers=1)
        rows.append(
            {
                "base_gib": taken["read"] / GIB,
                "written_gib": taken["written"] / GIB,
                "memory_gib": taken["memory_peak"] / GIB,
                "memory_above_start_gib": (taken["memory_peak"] - taken["memory_before"]) / GIB,
            }
        )
        if size != 2.0:
            shutil.rmtree(base)
    return rows


# -- bases -----------------------------------------------------------------------------------------


def _base(folder: Path, geometry: tuple[int, ...]) -> str:
    from benchmarks.bases import Geometry, make

    return str(make(folder / f"base of {geometry[0]} layers", Geometry(*geometry)))


def _flat(folder: Path, geometry: tuple[int, ...]) -> Path:
    """The base as the authors' operators take one: a flat file, a key for each layer and expert."""
    import torch

    path = folder / "flat" / "base.pt"
    if path.exists():
        return path
    path.parent.mkdir()
    layers, experts, hidden, ffn, vocab = geometry
    state: dict[str, torch.Tensor] = {
        "embedding.word_embeddings.weight": _random(vocab, hidden),
        "output_layer.weight": _random(vocab, hidden),
    }
    for layer in range(layers):
        name = f"decoder.layers.{layer}."
        state[name + "self_attention.linear_qkv.weight"] = _random(3 * hidden, hidden)
        state[name + "self_attention.linear_proj.weight"] = _random(hidden, hidden)
        state[name + "mlp.router.weight"] = _random(experts, hidden)
        for expert in range(experts):
            fc = name + "mlp.experts.linear_fc"
            state[f"{fc}1.weight{expert}"] = _random(2 * ffn, hidden)
            state[f"{fc}2.weight{expert}"] = _random(hidden, ffn)
    torch.save(state, path)
    return path


def _random(*shape: int) -> Any:
    import torch

    return torch.empty(shape).normal_(std=0.02).to(torch.bfloat16)


def _sparse_base(load: Path, layers: int, experts: int, scale: int) -> int:
    """Metadata of a base over files of holes: a link reads no weight. Returns its chunks."""
    import io
    import pickle
    from itertools import product

    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    from benchmarks.bases import DISTRIBUTED, Geometry
    from megatron_growth.checkpoint.directory import TRACKER
    from megatron_growth.checkpoint.source import COMMON_OBJECT

    geometry = Geometry(layers, experts, 8 * scale, 8 * scale, 64 * scale, DISTRIBUTED)
    directory = load / "iter_0000100"
    directory.mkdir(parents=True)
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    ends = [0] * 128
    for state in (None, *geometry.states):
        dtype = torch.float32 if state else torch.bfloat16
        for key, (shape, chunk) in geometry.tensors().items():
            name = f"optimizer.state.{state}.{key}" if state else key
            length = torch.Size(chunk).numel() * dtype.itemsize + 1024
            chunks = []
            for place in product(*(range(0, n, c) for n, c in zip(shape, chunk, strict=True))):
                file = len(storage) % len(ends)
                offset = torch.Size(place)
                storage[MetadataIndex(name, offset)] = _StorageInfo(
                    f"__{file}_0.distcp", ends[file], length
                )
                ends[file] += length
                chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk)))
            entries[name] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(shape), chunks
            )
    buffer = io.BytesIO()
    torch.save([{"args": geometry.args, "iteration": 100}], buffer)
    common = buffer.getvalue()
    (directory / "__common.distcp").write_bytes(common)
    entries[COMMON_OBJECT] = BytesStorageMetadata()
    storage[MetadataIndex(COMMON_OBJECT)] = _StorageInfo("__common.distcp", 0, len(common))
    for file, end in enumerate(ends):
        with (directory / f"__{file}_0.distcp").open("wb") as sparse:
            sparse.truncate(end)
    metadata = Metadata(entries, {key: (key,) for key in entries}, storage)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (load / TRACKER).write_text("100")
    return len(storage) - 1


# -- output ----------------------------------------------------------------------------------------


def _print(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else f"{v}" for v in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--folder", type=Path, help="where bases and results are made")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--child", nargs=2, metavar=("NAME", "JSON"), help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.child:
        print(json.dumps(CHILDREN[own.child[0]](**json.loads(own.child[1]))))
        return
    with tempfile.TemporaryDirectory(dir=own.folder) as name:
        folder = Path(name)
        tables = {
            "copy": measure_copy(folder, own.rounds, own.reference),
            "link": measure_link(folder, own.rounds),
            "memory": measure_memory(folder),
        }
    console = Console()
    for title, rows in tables.items():
        _print(console, title, rows)
    own.out.mkdir(parents=True, exist_ok=True)
    record = {**about(), "rounds": own.rounds, **tables}
    (own.out / "growing.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
