"""Reports on a terminal: rich tables, and nothing computed but text."""

import math
import shlex
from collections.abc import Sequence
from itertools import pairwise

from rich import box
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from megatron_growth.checkpoint.norms import PARTS, LayerScale
from megatron_growth.planning.cost import ParameterCount
from megatron_growth.planning.plan import Architecture
from megatron_growth.report.growth import (
    ARCHITECTURE,
    GrowthReport,
    describe_experts,
    describe_layers,
)
from megatron_growth.report.inspection import Inspection, Verdict

_BAR_WIDTH = 24
_LEVELS = "▁▂▃▄▅▆▇█"


def print_growth(console: Console, report: GrowthReport) -> None:
    """What a plan will do."""
    for part in (
        _facts(report),
        _architecture(report),
        _maps(report),
        _parameters(report),
        _roads(report),
    ):
        console.print(part)
        console.print()
    _print_arguments(console, report)
    for warning in report.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), warning))


def print_inspection(console: Console, inspection: Inspection) -> None:
    """What a checkpoint holds."""
    console.print(_contents(inspection))
    console.print()
    if inspection.scales:
        console.print(_scales(inspection.scales))
        console.print()
    console.print(_verdict(inspection.verdict))


# -- growth


def _facts(report: GrowthReport) -> RenderableType:
    plan = report.plan
    noise = f"experts {plan.noise.experts:g}, router {plan.noise.router:g}"
    masters = "" if plan.masters is None else f", fp32 masters in `{plan.masters}`"
    return _grid(
        ("base", f"{report.checkpoint}{_iteration(report.iteration)}"),
        ("fingerprint", plan.fingerprint),
        ("seed", str(plan.seed)),
        ("noise scale", f"{noise} (stream version {report.stream_version})"),
        ("optimizer", plan.optimizer + masters),
        ("keys", _forms(plan.source.key_form, plan.target.key_form)),
    )


def _forms(source: str, target: str) -> str:
    return source if source == target else f"{source} -> {target}"


def _architecture(report: GrowthReport) -> Table:
    table = _table("Architecture", "", "source", "target")
    for row in report.architecture:
        style = "" if row.source == row.target else "bold green"
        table.add_row(
            ARCHITECTURE[row.argument],
            Text(_shown(row.source)),
            Text(_shown(row.target), style=style),
        )
    return table


def _maps(report: GrowthReport) -> RenderableType:
    layers, experts = report.plan.layers, report.plan.experts
    copies = ", copies with zero output" if report.plan.zero_output else ""
    rows = [
        (
            "layer map",
            f"{layers.num_source} -> {layers.num_target}{copies}: {describe_layers(layers)}",
        )
    ]
    if experts.num_source:
        order = "" if experts.is_identity else f", {experts.order}"
        shown = describe_experts(experts)
        rows.append(("expert map", f"{experts.num_source} -> {experts.num_target}{order}: {shown}"))
    return _grid(*rows)


def _parameters(report: GrowthReport) -> Table:
    table = _table("Parameters", "", "source", "target", "")
    for name, before, after in zip(
        _COUNTS, _counts(report.source), _counts(report.target), strict=True
    ):
        ratio = f"x{after / before:.3g}" if before and after else ""
        table.add_row(name, _count(before), _count(after), ratio)
    table.add_row("F_c, one Chinchilla budget", _flops(report.source), _flops(report.target), "")
    return table


_COUNTS = ("total", "total, no embeddings", "activated per token", "activated, no embeddings")


def _counts(count: ParameterCount) -> tuple[int | None, ...]:
    activated = count.activated
    return (
        count.total,
        count.without_embeddings,
        activated.parameters if activated else None,
        activated.without_embeddings if activated else None,
    )


def _flops(count: ParameterCount) -> str:
    return f"{count.activated.chinchilla_flops:.3g} FLOPs" if count.activated else "unknown"


def _roads(report: GrowthReport) -> Table:
    table = _table("Bytes by road", "", "read", "written", "into the model")
    for road in report.roads:
        table.add_row(road.name, decimal(road.read), decimal(road.written), decimal(road.delivered))
    return table


def _print_arguments(console: Console, report: GrowthReport) -> None:
    """One option a line, never wrapped, so that it can be copied."""
    if report.arguments is None:
        return
    console.print(Text("Megatron arguments of the target", style="bold"))
    for line in _options(report.arguments):
        console.print(Text(f"  {line}"), soft_wrap=True)
    console.print()


def _options(arguments: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for word in arguments:
        if word.startswith("--") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


# -- inspection


def _contents(inspection: Inspection) -> RenderableType:
    model, count = inspection.architecture, inspection.parameters
    rows = [("checkpoint", f"{inspection.checkpoint}{_iteration(inspection.iteration)}"),
            ("written by", inspection.written_by)]  # fmt: skip
    if model:
        rows.append(("model", f"{model.num_layers} layers, {_experts(model)}"))
        rows.append(("keys", model.key_form))
    if count:
        activated = f", {_count(count.activated.parameters)} activated" if count.activated else ""
        rows.append(("parameters", f"{_count(count.total)}{activated}"))
    rows += [
        ("model tensors", f"{inspection.tensors[0]}, {decimal(inspection.weight_bytes)}"),
        ("other tensors", f"{inspection.tensors[1]}, {decimal(inspection.other_bytes)}"),
        ("pickled objects", str(inspection.objects)),
        ("data types", ", ".join(f"{name} ({n})" for name, n in inspection.dtypes.items())),
        ("optimizer", _optimizer(inspection)),
        ("saved at", _layout(inspection)),
    ]
    if inspection.unknown:
        rows.append(("not understood", f"{inspection.unknown} tensors"))
    return _grid(*rows)


def _experts(model: Architecture) -> str:
    if not model.num_experts:
        return "dense"
    return f"{model.num_experts} experts, top-k {'unknown' if model.top_k is None else model.top_k}"


def _optimizer(inspection: Inspection) -> str:
    if inspection.optimizer_format is None:
        return "none, weights only"
    states = ", ".join(inspection.optimizer_states)
    return inspection.optimizer_format + (f": {states}" if states else "")


def _layout(inspection: Inspection) -> str:
    sizes = " ".join(f"{name}{size}" for name, size in inspection.layout.items())
    ranks = "" if inspection.num_ranks is None else f" on {inspection.num_ranks} ranks"
    return f"{sizes}{ranks}" or "unknown"


def _scales(scales: Sequence[LayerScale]) -> RenderableType:
    """A table with a bar for each layer; bars start near the smallest, or the profile would look
    flat."""
    values = [scale.rms for scale in scales]
    low, high = _range(values)
    start = max(low - (high - low) / 4, 0.0)
    present = [part for part in PARTS if any(part in scale.parts for scale in scales)]
    table = _table("Weight scale by layer (RMS of elements)", "layer", "all", *present)
    table.add_column(f"{start:.5f} to {high:.5f}", justify="left", width=_BAR_WIDTH)
    for scale in scales:
        parts = (f"{scale.parts[part]:.5f}" if part in scale.parts else "" for part in present)
        length = scale.rms - start if math.isfinite(scale.rms) else 0.0
        bar = Bar(high - start or 1.0, 0, length, width=_BAR_WIDTH, color="cyan")
        table.add_row(str(scale.layer), f"{scale.rms:.5f}", *parts, bar)
    return Group(
        table, Text.assemble("profile ", (_sparkline(values), "cyan"), _largest_step(values))
    )


def _sparkline(values: Sequence[float]) -> str:
    low, high = _range(values)
    step = (high - low) / (len(_LEVELS) - 1) or 1.0
    return "".join(_LEVELS[round((v - low) / step)] if math.isfinite(v) else "!" for v in values)


def _range(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return min(finite, default=0.0), max(finite, default=0.0)


def _largest_step(values: Sequence[float]) -> str:
    """Where neighbours differ most: the seam, in a stacked model."""
    if not all(map(math.isfinite, values)):
        return "  some layers hold values that are not finite: the run has diverged"
    steps = [after - before for before, after in pairwise(values)]
    mean = sum(map(abs, steps)) / len(steps) if steps else 0.0
    if not mean:
        return ""
    at = max(range(len(steps)), key=lambda i: abs(steps[i]))
    ratio = abs(steps[at]) / mean
    return (
        f"  largest step {steps[at]:+.5f}, layer {at} to {at + 1}, {ratio:.1f} times the mean step"
    )


def _verdict(verdict: Verdict) -> RenderableType:
    if verdict.depth and verdict.depth == verdict.width:
        return Text.assemble(("cannot be grown", "bold red"), f": {verdict.depth}")
    lines = []
    for way, reason in (("depth", verdict.depth), ("width", verdict.width)):
        if reason is None:
            lines.append(Text.assemble(f"{way}: ", ("can be grown", "bold green")))
        else:
            lines.append(Text.assemble(f"{way}: ", ("cannot be grown", "bold red"), f": {reason}"))
    return Group(*lines)


# -- pieces


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _grid(*rows: tuple[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(value))
    return grid


def _iteration(iteration: int | None) -> str:
    return "" if iteration is None else f" (iteration {iteration})"


def _shown(value: int | float | str | None) -> str:
    return "-" if value is None else str(value)


def _count(number: int | None) -> str:
    """17990414336 as `17.99B`."""
    if number is None:
        return "unknown"
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return str(number)
