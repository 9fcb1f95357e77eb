"""The demo from data to figures: a base trained, grown, trained on, and set against scratch.

<out>/data          the datasets
<out>/base, grown   Megatron's checkpoints
<out>/growth.yaml   the growth configuration that was used
<out>/records       the losses of each run, as lines of JSON
<out>/logs          all that each run printed
<out>/curves.png    the losses, as a figure
<out>/summary.json  what was measured; it is written last: without it the demo is not finished
"""

import shutil
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_growth.checkpoint import manifest
from megatron_growth.demo import data, results, settings
from megatron_growth.demo.launch import Run, launch
from megatron_growth.demo.progress import Progress
from megatron_growth.demo.results import Curves, Model, Size, read_curves
from megatron_growth.demo.settings import FULL, QUICK, Settings
from megatron_growth.errors import CheckpointError, ConfigError, GrowthError

GROWTH = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
SCRIPT = Path(__file__).with_name("train.py")
SUMMARY = "summary.json"

_MARKER = ".megatron_growth_demo"
_PACKAGES = ("megatron-growth", "megatron-core", "torch", "numpy")


@dataclass(frozen=True)
class Demo:
    """One demo under way."""

    out: Path
    settings: Settings
    progress: Progress


def run_demo(out: Path, quick: bool) -> None:
    """See `megatron_growth.demo.run`."""
    console = Console(highlight=False)
    claim(out, console)
    demo = Demo(out, QUICK if quick else FULL, Progress(console))
    corpus = _prepare(demo)
    base = _train_base(demo)
    grown = _grow_and_train(demo)
    scratch = _train_from_scratch(demo)
    models = _report(demo, corpus, base, grown, scratch)
    console.print()
    console.print(results.table(models))
    console.print(results.verdict(models))
    console.print(f"\ncurves: {out / 'curves.png'}\nnumbers: {out / SUMMARY}")
    console.print(f"look inside: megatron-growth inspect {out / 'grown'}")


def claim(out: Path, console: Console) -> None:
    """Make the directory ours, and empty.

    Raises:
        ConfigError: it holds something that no demo made.
    """
    if not GROWTH.is_file():
        raise ConfigError(
            f"{str(GROWTH)!r} is missing; run the demo from a checkout of megatron_growth"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a file; give a directory")
    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARKER).is_file():
            raise ConfigError(
                f"--out {str(out)!r} holds files that no demo made; give a new or empty directory"
            )
        console.print(f"replacing the earlier demo in {out}")
        _empty(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
    shutil.copyfile(GROWTH, out / "growth.yaml")


def _empty(out: Path) -> None:
    (out / SUMMARY).unlink(missing_ok=True)  # first, so that no half of it looks finished
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _MARKER:
            path.unlink()


# -- the phases


def _prepare(demo: Demo) -> data.Corpus:
    with demo.progress.phase("data", "the source of Python's standard library, byte by byte"):
        return data.prepare(demo.out / "data", demo.settings.heldout_tokens)


def _train_base(demo: Demo) -> Curves:
    words = settings.base_arguments(demo.settings, demo.out / "data", demo.out / "base")
    words = ["-m", "megatron_growth.demo.train", *words]
    title = f"trained on {settings.BASE_RANKS} ranks ({_layout(settings.BASE_LAYOUT)})"
    return _train(demo, "base", title, settings.BASE_RANKS, words, (0, demo.settings.base_steps))


def _grow_and_train(demo: Demo) -> Curves:
    out, first = demo.out, demo.settings.base_steps
    words = settings.grown_arguments(demo.settings, out / "data", out / "base", out / "grown")
    growth = ["--growth-config", str(out / "growth.yaml")]
    words = ["-m", "megatron_growth.run", str(SCRIPT), *growth, *words]
    ranks = f"{settings.LARGE_RANKS} ranks ({_layout(settings.LARGE_LAYOUT)})"
    title = f"grown while {ranks} load it, and trained on"
    steps = first, first + demo.settings.extra_steps
    return _train(demo, "grown", title, settings.LARGE_RANKS, words, steps)


def _train_from_scratch(demo: Demo) -> Curves:
    words = settings.scratch_arguments(demo.settings, demo.out / "data")
    words = ["-m", "megatron_growth.demo.train", *words]
    title = "the large model from random weights, as many steps on the same samples"
    steps = 0, demo.settings.extra_steps
    return _train(demo, "scratch", title, settings.LARGE_RANKS, words, steps)


def _train(
    demo: Demo, name: str, title: str, ranks: int, words: list[str], steps: tuple[int, int]
) -> Curves:
    """One torchrun, from its first step to its last."""
    first, last = steps
    record = demo.out / "records" / f"{name}.jsonl"
    record.parent.mkdir(exist_ok=True)
    run = Run(name, ranks, [*words, "--record", str(record)], demo.out / "logs" / f"{name}.log")
    with demo.progress.phase(name, title), demo.progress.steps(name, last - first) as advance:

        def watch() -> None:
            for step, loss in read_curves(record).train[-1:]:
                advance(step - first, loss)

        launch(run, watch)
    curves = read_curves(record)
    measured = [step for step, _ in curves.heldout]
    if measured[:1] != [first] or measured[-1:] != [last]:
        raise GrowthError(
            f"the run {name!r} was measured after steps {measured}, not from {first} to {last}; "
            f"see its log, {str(run.log)!r}"
        )
    return curves


def _report(
    demo: Demo, corpus: data.Corpus, base: Curves, grown: Curves, scratch: Curves
) -> list[Model]:
    from megatron_growth.demo.figure import plot_curves  # matplotlib takes a second to import

    growth = manifest.read(demo.out / "grown")
    if growth is None:
        raise CheckpointError(f"{str(demo.out / 'grown')!r} has no {manifest.MANIFEST}: not grown")
    small, large = (_size(growth["plan"][side]) for side in ("source", "target"))
    models = results.measured(base, grown, scratch, (small, large))
    with demo.progress.phase("report", "curves and summary"):
        title = f"{small} grown into {large}"
        plot_curves(base, grown, scratch, demo.out / "curves.png", title)
    results.write_json(demo.out / SUMMARY, _summary(demo, corpus, growth, models))
    return models


def _summary(
    demo: Demo, corpus: data.Corpus, growth: dict[str, Any], models: list[Model]
) -> dict[str, Any]:
    own = {"tokens_per_step": settings.TOKENS_PER_STEP, "learning_rate": settings.LEARNING_RATE}
    sizes = {name: value for name, value in asdict(corpus).items() if isinstance(value, int)}
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in _PACKAGES}
    return {
        **{model.key: model.document() for model in models},
        "counting": results.COUNTING,
        "verdict": results.verdict(models),
        "settings": {**asdict(demo.settings), **own, "growth": growth["growth"]},
        "plan_fingerprint": growth["plan_fingerprint"],
        "data": sizes,
        "seconds": demo.progress.seconds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
    }


def _size(model: dict[str, Any]) -> Size:
    return Size(model["num_layers"], model["num_experts"], model["top_k"])


def _layout(words: list[str]) -> str:
    """`pipeline 2 x expert 2`, of Megatron's options."""
    options = (word.removeprefix("--").split("-")[0] for word in words[::2])
    return " x ".join(f"{option} {size}" for option, size in zip(options, words[1::2], strict=True))
