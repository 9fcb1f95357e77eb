"""What the demo measured: read from the runs' records, shown as a table, written as JSON."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from megatron_growth.demo.settings import TOKENS_PER_STEP

Point = tuple[int, float]

COUNTING = (
    "`tokens` counts all training tokens that went into a model's weights, for a grown model those "
    "of its base and its own; `own_tokens` counts those at the model's present size. A token is a "
    "byte. `heldout_loss` is the mean over the whole held-out set, in nats per token."
)


@dataclass(frozen=True)
class Curves:
    """One run's losses, each after the number of steps that stands before it."""

    train: tuple[Point, ...]
    heldout: tuple[Point, ...]


def read_curves(record: Path) -> Curves:
    """What a run has recorded so far; while it runs, its last line may be half written."""
    lines = record.read_text(encoding="utf-8").splitlines(keepends=True) if record.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    train, heldout = (
        tuple((row["iteration"], row["loss"]) for row in rows if row["kind"] == kind)
        for kind in ("train", "heldout")
    )
    return Curves(train, heldout)


@dataclass(frozen=True)
class Size:
    """What growth changes in a model."""

    layers: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.experts} experts (top-{self.top_k})"


@dataclass(frozen=True)
class Model:
    """One of the models that are compared."""

    key: str
    """Its name in the summary."""

    title: str
    """Its name in the table."""

    size: Size

    heldout_loss: float

    own_tokens: int
    """Training tokens at its present size."""

    base_tokens: int = 0
    """Training tokens of its base."""

    @property
    def tokens(self) -> int:
        """All that went into its weights."""
        return self.base_tokens + self.own_tokens

    def document(self) -> dict[str, int | float]:
        """As JSON takes it."""
        return {
            "heldout_loss": self.heldout_loss,
            "tokens": self.tokens,
            "own_tokens": self.own_tokens,
            **asdict(self.size),
        }


def measured(base: Curves, grown: Curves, scratch: Curves, sizes: tuple[Size, Size]) -> list[Model]:
    """The four models of the demo; `sizes` are the base's and the large one's."""
    small, large = sizes
    start, base_loss = base.heldout[-1]
    _, grown_loss = grown.heldout[0]
    last, last_loss = grown.heldout[-1]
    steps, scratch_loss = scratch.heldout[-1]
    tokens, own = start * TOKENS_PER_STEP, (last - start) * TOKENS_PER_STEP
    return [
        Model("base", "base", small, base_loss, tokens),
        Model("grown_step0", "grown, step 0", large, grown_loss, 0, tokens),
        Model("grown", f"grown, step {last - start}", large, last_loss, own, tokens),
        Model("scratch", f"scratch, step {steps}", large, scratch_loss, steps * TOKENS_PER_STEP),
    ]


def table(models: Sequence[Model]) -> Table:
    """For a terminal."""
    shown = Table(title="Held-out loss, in nats per byte", box=SIMPLE_HEAD, pad_edge=False)
    shown.title_justify, shown.title_style = "left", "bold"
    shown.add_column("model", no_wrap=True)
    for name in ("layers", "experts", "top-k", "own tokens", "in all", "loss"):
        shown.add_column(name, justify="right")
    for model in models:
        size = (str(number) for number in astuple(model.size))
        tokens = f"{model.own_tokens:,}", f"{model.tokens:,}"
        shown.add_row(model.title, *size, *tokens, f"{model.heldout_loss:.4f}")
    return shown


def verdict(models: Sequence[Model]) -> str:
    """What the numbers say, whichever way they fell."""
    loss = {model.key: model.heldout_loss for model in models}
    jump, lead = loss["grown_step0"] - loss["base"], loss["scratch"] - loss["grown"]
    return (
        f"Growth itself moved the held-out loss by {jump:+.4f}; a jump is expected, for copied "
        "layers change the function. "
        f"After training, the grown model is {abs(lead):.4f} {'below' if lead > 0 else 'ABOVE'} "
        "scratch, which took as many steps on the same samples, and "
        f"{loss['grown'] - loss['base']:+.4f} from its base."
    )


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
