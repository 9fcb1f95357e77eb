"""Before a stage trains: are the nodes alike, healthy, and able to write, and is the base sound?

    python -m megatron_growth.launcher.preflight --checkpoints DIR --bytes N --report FILE \
        [--growth GROWTH_FILE] [--module NAME]...

started like the training itself, on every rank. A node that fails takes the job down in a minute,
named, instead of in an hour, unnamed. Bandwidths have no published floor, so each node is compared
with the median of the job: within the node by all-reduce, and with a neighbour by all-to-all.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_growth.launcher.node import disk_problems, gpu_problems, module_problems
from megatron_growth.launcher.parent import parent_problem

_PACKAGES = ("megatron-growth", "megatron-core", "torch", "transformer-engine", "deep-ep")
_FLOOR = 0.8  # of the median
_BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}
_REPEATS = 5
_SKEW = 5.0  # seconds between clocks


@dataclass(frozen=True)
class Finding:
    """What one rank saw."""

    host: str
    device: str
    versions: dict[str, str | None]
    clock: float
    problems: tuple[str, ...] = ()
    """What it alone can tell: GPUs, modules, disk; for its node, so one rank speaks for all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check; 0 when all is well."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--growth", type=Path)
    parser.add_argument("--module", action="append", default=[])
    options = parser.parse_args(argv)
    device = _device()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=5)
    )
    dist.barrier()  # so that clocks are read at one time
    found = _gathered(_finding(options, device))
    speeds = _speeds(device)
    problems = compared(found)
    if device.type == "cuda":  # CPU ranks share their cores, and are only shown to get through
        problems += slow(speeds, [one.host for one in found])
    problems += _of_the_base(options)
    if dist.get_rank() == 0:
        _report(options.report, found, speeds, problems)
    dist.barrier()
    dist.destroy_process_group()
    return 1 if problems else 0


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def _finding(options: argparse.Namespace, device: torch.device) -> Finding:
    clock = time.time()  # first, while all are at one time
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {package: _version(package) for package in _PACKAGES}
    return Finding(socket.gethostname(), name, versions, clock, tuple(_alone(options, device)))


def _alone(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if device.type == "cuda":
        yield from gpu_problems()
    yield from module_problems(options.module)
    yield from disk_problems(options.checkpoints, options.bytes)


def _of_the_base(options: argparse.Namespace) -> list[str]:
    """The first rank looks, and all end alike."""
    said: list[str | None] = [None]
    if options.growth and dist.get_rank() == 0:
        said = [parent_problem(options.growth, options.checkpoints)]
    dist.broadcast_object_list(said, src=0)
    return [one for one in said if one]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gathered(finding: Finding) -> list[Finding]:
    found: list[Finding | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, finding)
    return [one for one in found if one is not None]


def compared(found: Sequence[Finding]) -> list[str]:
    """What is wrong with a node, or differs between them."""
    problems = [f"{one.host}: {problem}" for one in found for problem in one.problems]
    for one in found:
        if one.device != found[0].device:
            problems.append(
                f"{one.host}: has {one.device}, {found[0].host} {found[0].device}; --exclude the "
                "node, or ask for one kind by a --constraint in slurm.options"
            )
        for package, number in one.versions.items():
            first = found[0].versions[package]
            if number != first:
                problems.append(
                    f"{one.host}: {package} {number}, {found[0].host} has {first}; give all nodes "
                    "one image or environment"
                )
    clocks = [one.clock for one in found]
    if max(clocks) - min(clocks) > _SKEW:
        late = min(found, key=lambda one: one.clock)
        problems.append(f"{late.host}: its clock is {max(clocks) - min(clocks):.0f} s late; set it")
    return sorted(set(problems))


def slow(speeds: Sequence[dict[str, float]], hosts: Sequence[str]) -> list[str]:
    """Nodes far below the median of the job."""
    problems = set()
    for measure in speeds[0]:
        median = statistics.median(speed[measure] for speed in speeds)
        for speed, host in zip(speeds, hosts, strict=True):
            if speed[measure] < _FLOOR * median:
                share = speed[measure] / median
                problems.add(f"{host}: {measure} at {share:.0%} of the median; --exclude the node")
    return sorted(problems)


def _speeds(device: torch.device) -> list[dict[str, float]]:
    """Bytes a second by measure, for each rank."""
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), dist.get_world_size()
    nodes = world // local
    own = {"all-reduce in the node": 0.0}
    for node in range(nodes):
        inside = list(range(node * local, (node + 1) * local))
        own["all-reduce in the node"] += _timed(inside, device, _all_reduce)
    if nodes > 1:
        # With either neighbour; a good node beside a bad one is good with the other.
        pairs = []
        for node in range(nodes):
            two = sorted({node, (node + 1) % nodes})
            both = [n * local + i for n in two for i in range(local)]
            pairs.append(_timed(both, device, _all_to_all))
        own["all-to-all between nodes"] = max(pairs)
    speeds: list[dict[str, float] | None] = [None] * world
    dist.all_gather_object(speeds, own)
    return [speed for speed in speeds if speed is not None]


def _timed(
    ranks: list[int],
    device: torch.device,
    collective: Callable[[torch.Tensor, dist.ProcessGroup], None],
) -> float:
    """Bytes a second of a collective among these ranks; 0 on the others, which wait."""
    group: dist.ProcessGroup = dist.new_group(ranks)  # type: ignore[assignment]
    speed = 0.0
    if dist.get_rank() in ranks:
        length = _BYTES[device.type] // 4 // len(ranks) * len(ranks)
        data = torch.ones(length, device=device)
        collective(data, group)  # warm
        _wait(device)
        start = time.perf_counter()
        for _ in range(_REPEATS):
            collective(data, group)
        _wait(device)
        speed = 4 * length * _REPEATS / (time.perf_counter() - start)
    dist.barrier()
    return speed


def _all_reduce(data: torch.Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(data, group=group)


def _all_to_all(data: torch.Tensor, group: dist.ProcessGroup) -> None:
    dist.all_to_all_single(torch.empty_like(data), data, group=group)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _report(
    path: Path,
    found: Sequence[Finding],
    speeds: Sequence[dict[str, float]],
    problems: Sequence[str],
) -> None:
    ranks = [{**asdict(one), "speeds": speed} for one, speed in zip(found, speeds, strict=True)]
    path.write_text(json.dumps({"problems": list(problems), "ranks": ranks}, indent=2))
    for problem in problems:
        print(f"preflight: {problem}", file=sys.stderr)
    if not problems:
        print(f"preflight is well: {len(found)} ranks, {len({f.host for f in found})} hosts")


if __name__ == "__main__":
    sys.exit(main())
