"""What one rank does before the first byte of a checkpoint is read: seconds and memory, at growth
on load, and at a plain load of the same grown model written out.

    python -m benchmarks.load_planning [--out benchmarks/results]

Only metadata is made, as Megatron saves it with `fully_reshardable` optimizer state, and data files
that are holes of the right length; reading stops where it would begin. Each row is a process of its
own; seconds are of CPU. Growth on load spends them on

    metadata    unpickling `.metadata`
    opening     our checks and plan
    planner     DCP's, from the boxes that the rank wants to read items
    resolving   read items to source chunks, in the order that they lie on disk

and a plain load has the first and the third. Where DCP's planner would take minutes it plans the
weights alone, and its time is multiplied by the four (weights and three states) of the whole.
"""

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from benchmarks.about import about
from megatron_growth import GrowthConfig, GrowthStorageReader

Shape = tuple[int, ...]
Cuts = list[int]  # where an axis is cut, both ends included

STATES = ("param", "exp_avg", "exp_avg_sq")
GROWTH = GrowthConfig.model_validate({"depth": {"factor": 2}, "width": {"factor": 2}})
FACTOR = 2
NUM_FILES = 512  # of a base that 256 ranks saved with two writers each
SLOW_CHUNKS = 500_000  # more than these, and the plain planner plans the weights alone


@dataclass(frozen=True)
class Model:
    """A base, and how it was sharded when it was saved; growth doubles layers and experts."""

    layers: int
    experts: int
    hidden: int
    ffn: int
    tp: int
    etp: int
    vocab: int = 131072

    def grown(self) -> "Model":
        return Model(self.layers * FACTOR, self.experts * FACTOR, self.hidden, self.ffn,
                     self.tp, self.etp, self.vocab)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How the grown model is sharded when it is loaded."""

    ranks: int
    tp: int
    pp: int
    ep: int

    def __str__(self) -> str:
        return f"TP{self.tp} PP{self.pp} EP{self.ep}"


MODELS = {
    "70B": Model(28, 96, 2048, 1024, tp=2, etp=1),
    "1T": Model(48, 256, 7168, 2048, tp=4, etp=4),
}
LAYOUTS = {
    "70B": (Layout(512, 2, 4, 8), Layout(4096, 2, 8, 64)),
    "1T": (Layout(512, 4, 8, 64), Layout(4096, 4, 16, 128)),
}


# -- the model's tensors and how they are cut


def tensors(m: Model) -> Iterator[tuple[str, Shape, list[Cuts]]]:
    """Key, shape and cuts of each weight: a chunk for each (layer, expert, half, shard)."""
    kv = m.hidden // 4
    layer = {
        "self_attention.linear_qkv.weight": ((m.hidden + 2 * kv, m.hidden), (m.tp, 1)),
        "self_attention.linear_qkv.layer_norm_weight": ((m.hidden,), (1,)),
        "self_attention.linear_proj.weight": ((m.hidden, m.hidden), (1, m.tp)),
        "pre_mlp_layernorm.weight": ((m.hidden,), (1,)),
        "mlp.router.weight": ((m.experts, m.hidden), (1, 1)),
        "mlp.experts.experts.linear_fc1.weight": (
            (m.experts, 2 * m.ffn, m.hidden), (m.experts, 2 * m.etp, 1),
        ),
        "mlp.experts.experts.linear_fc2.weight": (
            (m.experts, m.hidden, m.ffn), (m.experts, 1, m.etp),
        ),
    }  # fmt: skip
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        yield key, (m.vocab, m.hidden), [_even(m.vocab, m.tp), [0, m.hidden]]
    yield "decoder.final_layernorm.weight", (m.hidden,), [[0, m.hidden]]
    for name, (shape, parts) in layer.items():
        cuts = [_even(length, n) for length, n in zip(shape, parts, strict=True)]
        yield f"decoder.layers.{name}", (m.layers, *shape), [_even(m.layers, m.layers), *cuts]


def _even(length: int, parts: int) -> Cuts:
    return [i * length // parts for i in range(parts + 1)]


def _chunks(cuts: list[Cuts]) -> Iterator[ChunkStorageMetadata]:
    for box in product(*(list(pairwise(axis)) for axis in cuts)):
        yield ChunkStorageMetadata(
            torch.Size([a for a, _ in box]), torch.Size([b - a for a, b in box])
        )


def _with_states(key: str) -> Iterator[tuple[str, torch.dtype]]:
    yield key, torch.bfloat16
    yield from ((f"optimizer.state.{state}.{key}", torch.float32) for state in STATES)


def wanted(m: Model, layout: Layout) -> Iterator[tuple[str, Shape, list[Cuts]]]:
    """What the first rank of a layout loads of a grown model: its layers, its experts, its
    shard."""
    mine = Model(m.layers, m.experts, m.hidden, m.ffn, layout.tp, 1, m.vocab)
    for key, shape, cuts in tensors(mine):
        cuts = [list(axis) for axis in cuts]
        if "layers." in key:
            cuts[0] = cuts[0][: m.layers // layout.pp + 1]
        if ".experts." in key:
            cuts[1] = cuts[1][: m.experts // layout.ep + 1]
        elif layout.tp > 1:
            cuts = [axis[:2] if len(axis) == layout.tp + 1 else axis for axis in cuts]
        yield key, shape, cuts


# -- files


def write(directory: Path, m: Model) -> int:
    """A checkpoint of a model without its values; returns how many chunks it has."""
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    ends = [0] * NUM_FILES
    for key, shape, cuts in tensors(m):
        for text, dtype in _with_states(key):
            chunks = list(_chunks(cuts))
            entries[text] = TensorStorageMetadata(
                TensorProperties(dtype), torch.Size(shape), chunks
            )
            for number, chunk in enumerate(chunks):
                file = number * NUM_FILES // len(chunks)
                length = chunk.sizes.numel() * dtype.itemsize + 1200  # as torch.save pads it
                storage[MetadataIndex(text, chunk.offsets)] = _StorageInfo(
                    f"__{file // 2}_{file % 2}.distcp", ends[file], length
                )
                ends[file] += length
    directory.mkdir(parents=True)
    for file, end in enumerate(ends):
        with open(directory / f"__{file // 2}_{file % 2}.distcp", "wb") as stream:
            stream.truncate(end)
    metadata = Metadata(entries, {key: (key,) for key in entries}, storage)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return len(storage)


# -- one rank


class _Boxes:
    """What DCP's planner needs to know of a sharded tensor."""

    def __init__(self, shape: Shape, cuts: list[Cuts]) -> None:
        self._size, self._chunks = torch.Size(shape), list(_chunks(cuts))

    def size(self) -> torch.Size:
        return self._size

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks


class _FirstByte(Exception):
    """Now it would be read."""


class _Reader(FileSystemReader):
    """Times the reading of metadata, and stops before data."""

    seconds = 0.0

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        start = time.process_time()
        metadata = super().read_metadata(*args, **kwargs)
        self.seconds += time.process_time() - start
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        raise _FirstByte


def measure(road: str, directory: Path, m: Model, layout: Layout, *, slow: bool) -> dict[str, Any]:
    """One rank's way to the first byte.

    Args:
        road: `growth` or `plain`.
        directory: of the base, or of the grown checkpoint.
        m: the grown model.
        layout: of the run.
        slow: whether to plan the weights alone, and multiply.
    """
    state = {
        text: _Boxes(shape, cuts)
        for key, shape, cuts in wanted(m, layout)
        for text, _ in ([(key, None)] if slow else _with_states(key))
    }
    base = _Reader(directory)
    before = _memory("VmRSS")
    start = time.process_time()
    reader = GrowthStorageReader(directory, GROWTH, base) if road == "growth" else base
    opened = time.process_time()
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    ready = time.process_time()
    plan = create_default_local_load_plan(state, metadata)
    planned = time.process_time()
    try:
        reader.read_data(plan, DefaultLoadPlanner())
    except _FirstByte:
        resolved = time.process_time()
    factor = 1 + len(STATES) if slow else 1
    seconds = {
        "metadata": base.seconds,
        "opening": opened - start - base.seconds if road == "growth" else 0.0,
        "planner": (planned - ready) * factor + (ready - opened if road == "growth" else 0.0),
        "resolving": resolved - planned if road == "growth" else 0.0,
    }
    return {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "read_items": len(plan.items) * factor,
        "rss_growth_mib": (_memory("VmHWM") - before) >> 20,
        "extrapolated": slow,
    }


def _memory(name: str) -> int:
    """Resident bytes of this process, now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise ValueError(name)


# -- all of them


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # a child: what, where, which
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_one(*arguments.one)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            rows += _rows(name, Path(folder))
    Console(width=130).print(_table(rows))
    record = {
        **about(),
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "load_planning.json").write_text(json.dumps(record, indent=1) + "\n")


def _rows(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    for road, what in (("growth", "base"), ("plain", "grown")):
        directory = folder / f"{name}-{what}"
        chunks = _child(["write", str(directory), name, what])
        for index, layout in enumerate(LAYOUTS[name]):
            slow = road == "plain" and chunks > SLOW_CHUNKS
            found = _child([f"{road}{'-slow' if slow else ''}", str(directory), name, str(index)])
            yield {"model": name, "road": road, "ranks": layout.ranks, "layout": str(layout),
                   "chunks": chunks, **found}  # fmt: skip


def _child(words: list[str]) -> Any:
    command = [sys.executable, "-m", "benchmarks.load_planning", "--one", *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _one(what: str, directory: str, name: str, which: str) -> Any:
    base = MODELS[name]
    if what == "write":
        return write(Path(directory), base if which == "base" else base.grown())
    road, _, slow = what.partition("-")
    return measure(road, Path(directory), base.grown(), LAYOUTS[name][int(which)], slow=bool(slow))


def _table(rows: list[dict[str, Any]]) -> Table:
    parts = ("metadata", "opening", "planner", "resolving", "total")
    table = Table("model", "load", "ranks", "layout", "chunks", *parts, "RSS",
                  title="One rank, until the first byte would be read: seconds; MiB")  # fmt: skip
    for row in rows:
        mark = "~" if row["extrapolated"] else ""
        table.add_row(
            row["model"], row["road"], str(row["ranks"]), row["layout"], f"{row['chunks']:,}",
            *(f"{mark if p in ('planner', 'total') else ''}{row['seconds'][p]:.2f}" for p in parts),
            f"{row['rss_growth_mib']:,}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
