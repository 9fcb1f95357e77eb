"""What is worth saying of a stage before it runs: what will not divide, not fit, and why.

Each note names the place in the experiment's file, what is wrong there, and what to do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.sharding import LAYOUT, layout_problem, unknown
from megatron_growth.planning.memory import BUFFERS, Memory


@dataclass(frozen=True)
class Note:
    """A remark on a stage.

    Attributes:
        severity: an error will not run, a warning may not, the rest is information.
        path: where the experiment says it, with the value where it is one: `stages[1].layout.expert
            3`.
        text: what is to be said of it.
    """

    severity: Literal["error", "warning", "information"]
    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def notes(
    experiment: Experiment, link: Link, held: Memory, boundary: int | None, sunk: int | None
) -> Iterator[Note]:
    """All notes on a stage.

    Args:
        experiment: it all.
        link: the stage.
        held: memory of its fullest rank.
        boundary: F_c of what it grows, None where it grows nothing.
        sunk: FLOPs spent on that, None where they are not known.
    """
    yield from divisions(experiment, link)
    if experiment.cluster.device != "cpu":
        yield from _fit(experiment, link, held)
        for path, way in unknown(link):
            text = f"the estimate of memory does not know it; expect {way}"
            yield Note("information", path, text)
    if boundary is not None and sunk is not None:
        yield from _depth(link, sunk / boundary)


def divisions(experiment: Experiment, link: Link) -> Iterator[Note]:
    """What does not divide."""
    for path, text in _divide(link, experiment.cluster.processes_per_node):
        yield Note("error", f"{link.path}.{path}", f"does not divide: {text}")


def _divide(link: Link, processes: int) -> Iterator[tuple[str, str]]:
    """What Megatron would refuse, or miss: path and value, and what is wrong."""
    stage, layout, model = link.stage, link.stage.layout, link.model
    gpus = stage.nodes * processes
    dense = layout.tensor * layout.pipeline * layout.context
    expert = layout.expert * layout.expert_tensor * layout.pipeline
    has = f"the GPUs ({stage.nodes} nodes x {processes} = {gpus})"
    if gpus % dense:
        yield (
            "layout",
            f"tensor x pipeline x context ({layout.tensor} x {layout.pipeline} x {layout.context} "
            f"= {dense}) must divide {has}; change one of them, or nodes",
        )
    if gpus % expert:
        yield (
            "layout",
            f"expert x expert_tensor x pipeline ({layout.expert} x {layout.expert_tensor} x "
            f"{layout.pipeline} = {expert}) must divide {has}; change one of them, or nodes",
        )
    for name, size, what in (
        ("expert", layout.expert, "num_experts"),
        ("tensor", layout.tensor, "num_attention_heads"),
    ):
        number = getattr(model, what)
        if number % size:
            yield (
                f"layout.{name} {size}",
                f"must divide {what} ({number}); it can be {_divisors(number)}",
            )
    yield from _divide_layers(link)
    if gpus % dense == 0 and stage.global_batch_size % (stage.micro_batch_size * (gpus // dense)):
        batch = stage.micro_batch_size * (gpus // dense)
        yield (
            f"global_batch_size {stage.global_batch_size}",
            f"must be a multiple of micro_batch_size x data ({stage.micro_batch_size} x "
            f"{gpus // dense} = {batch}); take {batch * max(1, stage.global_batch_size // batch)}",
        )


def _divide_layers(link: Link) -> Iterator[tuple[str, str]]:
    layout, layers = link.stage.layout, link.model.num_layers
    options = link.stage.megatron
    if LAYOUT in options:
        wrong = layout_problem(link)
        if wrong:
            yield f"megatron.{LAYOUT} {options[LAYOUT]!r}", f"{wrong}; write it for this model"
        return
    stages = layout.pipeline * (layout.virtual or 1)
    if (
        any(name.startswith(("decoder-", "account-for-")) for name in options)
        or not layers % stages
    ):
        return
    if layers % layout.pipeline or not layout.virtual:
        advice = f"take a pipeline of {_divisors(layers)}, or give {LAYOUT} in megatron"
    else:
        advice = f"with this pipeline, virtual can be {_divisors(layers // layout.pipeline)}"
    place = f"virtual {layout.virtual}" if layout.virtual else f"pipeline {layout.pipeline}"
    yield (
        f"layout.{place}",
        f"pipeline x virtual ({layout.pipeline} x {layout.virtual or 1} = {stages}) must divide "
        f"num_layers ({layers}); {advice}",
    )


def _divisors(number: int) -> str:
    *some, last = (str(d) for d in range(1, number + 1) if number % d == 0)
    return f"{', '.join(some)} or {last}" if some else last


def _fit(experiment: Experiment, link: Link, held: Memory) -> Iterator[Note]:
    has = experiment.cluster.memory_gb * 1e9
    where = f" on pipeline rank {held.pipeline_rank}" if link.stage.layout.pipeline > 1 else ""
    takes = (
        f"{held.total / 1e9:.0f} GB{where} and {BUFFERS / 1e9:.0f} GB of buffers, of "
        f"{has / 1e9:.0f} GB (cluster.memory_gb)"
    )
    path = f"{link.path}.layout"
    if held.total + BUFFERS > has:
        yield Note("error", path, f"does not fit: {takes}; {_relief(link, held)}")
    elif 1.15 * held.total + BUFFERS > has:
        yield Note("warning", path, f"tight: {takes}, by an estimate good to 15%")


def _relief(link: Link, held: Memory) -> str:
    """Against what takes most."""
    if held.activations >= held.total / 2:
        if link.stage.micro_batch_size > 1:
            return "lower micro_batch_size, or recompute moe_act and layernorm in megatron"
        return (
            "recompute more in megatron (moe_act, layernorm; then moe), or raise tensor or context"
        )
    if held.optimizer >= held.total / 2:
        return "spread the optimizer over more nodes, or raise expert or pipeline"
    return "raise expert or pipeline"


def _depth(link: Link, ratio: float) -> Iterator[Note]:
    growth = link.stage.growth
    if growth is None or growth.depth is None:
        return
    path = f"{link.path}.growth.depth"
    advice = "interposition is better" if ratio > 1 else "stacking does as well"
    yield Note(
        "information", path, f"{ratio:.1f} F_c sunk into the base; the paper finds that {advice}"
    )
    if ratio > 1 and growth.depth.method == "stacking":
        yield Note(
            "warning",
            f"{path}.method 'stacking'",
            "the baseline that the paper beats here; use interposition",
        )
