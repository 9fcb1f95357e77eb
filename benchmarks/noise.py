"""How fast one core draws noise and takes a standard deviation, beside how fast it copies memory.

    python -m benchmarks.noise [--out benchmarks/results]

Each round runs every case once, so that what else the machine does falls on all alike; the table
has the medians of CPU time. GB/s counts the values' bytes once, read or written, for all cases.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.about import about
from megatron_growth.checkpoint.noise import add_noise, normals, stream_key
from megatron_growth.checkpoint.sigma import standard_deviation
from megatron_growth.planning.pieces import Box, Stream

ROUNDS = 15
SHAPE = (2048, 7168)  # half of fc1, or fc2 the other way, of an expert of a large model
COLUMNS = 512  # of fc2's 2048, as four expert-tensor-parallel ranks cut it
STREAM = Stream(1234, "decoder.layers.mlp.experts.experts.linear_fc1.weight", 3, 5)


def cases() -> dict[str, tuple[torch.Tensor, Callable[[], object]]]:
    """Name -> the values that it runs over, and the run."""
    fp32 = torch.randn(SHAPE)
    bf16, other = fp32.bfloat16(), torch.empty_like(fp32)
    columns = torch.randn(SHAPE[1], COLUMNS)
    whole = Box((0, 0), SHAPE)
    cut = Box((0, COLUMNS), (SHAPE[1], COLUMNS))

    def added(values: torch.Tensor, box: Box, shape: tuple[int, int]) -> Callable[[], object]:
        return lambda: add_noise(values, box=box, shape=shape, stream=STREAM, scale=0.01)

    def drawn(count: int) -> None:
        for start in range(0, count, 1 << 20):  # as verification draws
            normals(stream_key(STREAM), start, min(1 << 20, count - start))

    return {
        "copy, fp32": (fp32, lambda: other.copy_(fp32)),
        "noise, added to fp32": (fp32, added(fp32.clone(), whole, SHAPE)),
        "noise, added to columns": (columns, added(columns, cut, (SHAPE[1], SHAPE[0]))),
        "noise, numpy's definition": (fp32, lambda: drawn(fp32.numel())),
        "torch.normal_, fp32": (fp32, lambda: other.normal_()),
        "sigma of fp32": (fp32, lambda: standard_deviation([fp32])),
        "sigma of bf16": (bf16, lambda: standard_deviation([bf16])),
        "torch.std of fp32": (fp32, lambda: fp32.std()),
        "torch.std of bf16, by way of fp32": (bf16, lambda: bf16.float().std()),
    }  # fmt: skip


def measure() -> dict[str, dict[str, float]]:
    """Rates of each case, of one thread's CPU time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    running = cases()
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(ROUNDS + 1):
        for name, (_, run) in running.items():
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
    rates = {}
    for name, (values, _) in running.items():
        median = statistics.median(seconds[name][1:])  # the first round compiles
        rates[name] = {
            "gval_per_s": values.numel() / median / 1e9,
            "gb_per_s": values.nbytes / median / 1e9,
        }
    return rates


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = parser.parse_args().out
    rates = measure()
    copy = rates["copy, fp32"]["gb_per_s"]
    table = Table("one core", "Gval/s", "GB/s", "of copying", title="Noise and sigma")
    for name, rate in rates.items():
        share = rate["gb_per_s"] / copy
        table.add_row(name, f"{rate['gval_per_s']:.2f}", f"{rate['gb_per_s']:.2f}", f"{share:.0%}")
    Console(width=100).print(table)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        **about(),
        "values": list(SHAPE),
        "rounds": ROUNDS,
        "rates": rates,
    }
    (out / "noise.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
