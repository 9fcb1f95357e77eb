"""The demo's curves: held-out and training loss against tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_growth.demo.results import Curves, Point
from megatron_growth.demo.settings import TOKENS_PER_STEP

# Colours of Okabe and Ito, told apart by everyone.
_COLOURS = {"base": "#0072B2", "grown": "#D55E00", "from scratch": "#555555"}
_Corner = Literal["upper center", "upper right"]
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
}


def plot_curves(base: Curves, grown: Curves, scratch: Curves, path: Path, title: str) -> None:
    """Write the figure: every token on the left; on the right the large model alone.

    Random weights, at a loss of about 5.5, are left out: the rest would be a flat line.
    """
    start, base_loss = base.heldout[-1]
    base, scratch = (Curves(run.train, run.heldout[1:]) for run in (base, scratch))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 4.8), layout="constrained")  # a bare Figure draws with Agg
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        whole, large = figure.subplots(1, 2, sharey=True)
        for name, curves in (("base", base), ("from scratch", scratch), ("grown", grown)):
            _draw(whole, name, curves)
        whole.axvline(_millions(start), color="black", linewidth=0.8, linestyle=":", label="growth")
        _finish(whole, "All tokens", "training tokens, base included", "upper center")
        whole.set_ylabel("loss (nats per byte)")
        _draw(large, "from scratch", scratch)
        _draw(large, "grown", grown, start)
        large.axhline(base_loss, color=_COLOURS["base"], linestyle="--", label="base when grown")
        _finish(large, "Same steps, same samples", "training tokens at this size", "upper right")
        large.set_ylim(top=max(base.heldout[0][1], scratch.heldout[0][1]) + 0.5)
        figure.savefig(path, dpi=160)


def _draw(axes: Axes, name: str, curves: Curves, start: int = 0) -> None:
    colour, heldout = _COLOURS[name], _scaled(curves.heldout, start)
    axes.plot(*_scaled(curves.train, start), color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(*heldout, color=colour, marker="o", markersize=4.5, label=f"{name}, held out")


def _scaled(points: Sequence[Point], start: int) -> tuple[list[float], list[float]]:
    return [_millions(step - start) for step, _ in points], [loss for _, loss in points]


def _millions(steps: int) -> float:
    return steps * TOKENS_PER_STEP / 1e6


def _finish(axes: Axes, title: str, label: str, legend: _Corner) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(f"{label} (millions)")
    axes.set_xlim(left=0)
    handles, _ = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], color="black", alpha=0.3, linewidth=0.8, label="in training"))
    axes.legend(handles=handles, frameon=False, loc=legend)
