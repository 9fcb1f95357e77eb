"""One thing that is wrong."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a grown checkpoint.

    Attributes:
        key: of the tensor or object; empty for what concerns the checkpoint as a whole.
        what: what is wrong, in words.
        layer: target layer, None where there is none or it concerns all.
        expert: target expert, likewise.
        elements: how many elements differ; 0 where elements were not compared.
        difference: largest |difference| of those, nan where one is not a number; None likewise.
    """

    key: str
    what: str
    layer: int | None = None
    expert: int | None = None
    elements: int = 0
    difference: float | None = None
