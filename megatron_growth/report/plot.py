"""The weight scale by layer as a figure, as in figure 2 of arXiv:2510.08008."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_growth.checkpoint.norms import PARTS, LayerScale
from megatron_growth.errors import CheckpointError, ConfigError

# Colours of Okabe and Ito, told apart by everyone.
_COLOURS = {"attention": "#0072B2", "experts": "#D55E00", "dense": "#009E73", "router": "#CC79A7"}


def check_path(path: Path) -> None:
    """Refuse a path that no figure can be written to.

    Raises:
        ConfigError: its directory is missing, or its ending names no image format.
    """
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError(
            f"--plot {str(path)!r} ends in no image format; use one of {', '.join(formats)}"
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f"--plot {str(path)!r}: there is no such directory; make {str(path.parent)!r} first"
        )


def plot_scales(scales: Sequence[LayerScale], path: Path, title: str) -> None:
    """Write the figure; its format goes by the ending of `path`.

    The layer as a whole stands alone above, for its rise of a few percent would vanish between the
    parts.

    Raises:
        CheckpointError: there is nothing to plot.
    """
    if not scales:
        raise CheckpointError(
            "the checkpoint has no decoder layer, so nothing can be plotted; leave --plot out"
        )
    with matplotlib.rc_context(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 10,
        }
    ):
        figure = Figure(figsize=(7, 5.6), layout="constrained")  # a bare Figure draws with Agg
        whole, parts = figure.subplots(2, 1, sharex=True)
        layers = [scale.layer for scale in scales]
        whole.plot(layers, [scale.rms for scale in scales], color="black", **_line(len(layers)))
        whole.set_title(title, loc="left")
        whole.set_ylabel("RMS, all weight matrices")
        for part in PARTS:
            points = [(scale.layer, scale.parts[part]) for scale in scales if part in scale.parts]
            if points:
                parts.plot(
                    *zip(*points, strict=True),
                    color=_COLOURS[part],
                    label=part,
                    **_line(len(layers)),
                )
        parts.set_ylabel("RMS by part")
        parts.set_xlabel("layer")
        _finish(parts)
        figure.savefig(path, dpi=160)


def _line(num_layers: int) -> dict[str, object]:
    return {"marker": "o", "markersize": 4 if num_layers <= 40 else 2.5, "linewidth": 1.5}


def _finish(parts: Axes) -> None:
    parts.xaxis.set_major_locator(MaxNLocator(integer=True))
    parts.legend(frameon=False, ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
