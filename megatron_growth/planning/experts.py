"""Width growth: which source expert each target expert is, and which clone of it.

An `ExpertMap` multiplies the experts of each MoE layer by an integer. Clone 0 is the original, to
the bit; clones 1, 2, ... get noise. Router rows follow the same map, so that a clone is addressed
by its own row.

    interleave   e0 e1  x2  ->  e0 e0' e1 e1'    clones beside the original: on its EP rank
    append   e0 e1  x2  ->  e0 e1 e0' e1'    originals first; the order of the paper's released code
"""

from dataclasses import dataclass
from typing import Literal

ExpertOrder = Literal["interleave", "append"]


@dataclass(frozen=True)
class ExpertMap:
    """Target expert -> (source expert, clone index).

    Attributes:
        num_source: experts of the source, in each MoE layer.
        factor: clones of each, the original counted; 1 is no width growth.
        order: where clones stand.
    """

    num_source: int
    factor: int
    order: ExpertOrder

    @property
    def num_target(self) -> int:
        return self.num_source * self.factor

    @property
    def is_identity(self) -> bool:
        return self.factor == 1

    def source(self, target: int) -> int:
        """The source expert of target expert `target`."""
        return target // self.factor if self.order == "interleave" else target % self.num_source

    def clone_index(self, target: int) -> int:
        """Which clone target expert `target` is; 0 is the original."""
        return target % self.factor if self.order == "interleave" else target // self.num_source

    def targets(self, source: int) -> tuple[int, ...]:
        """The target experts made from `source`, the original first."""
        if self.order == "interleave":
            return tuple(range(source * self.factor, (source + 1) * self.factor))
        return tuple(range(source, self.num_target, self.num_source))
