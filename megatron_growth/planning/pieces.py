"""What makes a part of a target tensor: a box of it, a box of a source tensor, and a transform.

Copy        the source's bits
Noise       source + N(0, (alpha * sigma)^2), a noisy clone (arXiv:2510.08008, section 3.2)
Divide      source / m or source / m^2, a moment whose gradient was split over m clones
Park        source - spread - 2, the selection bias of a clone that shall take no token yet
Zero        nothing: a residual output of a `zero_output` copy, the momentum of a parked clone
"""

import math
from dataclasses import dataclass

Shape = tuple[int, ...]

# Sigmoid scores lie in [0, 1], so with a bias lower by 2 than the lowest of the originals a clone
# is below every original by at least 1: by far more than sums of score and bias are rounded.
PARKING_DISTANCE = 2.0


@dataclass(frozen=True)
class Box:
    """A box of a tensor: `offsets` and `sizes`, one entry for each axis."""

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def intersect(self, other: "Box") -> "Box | None":
        """What both cover, or None."""
        low = tuple(map(max, self.offsets, other.offsets))
        high = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        if any(end <= start for start, end in zip(low, high, strict=True)):
            return None
        return Box(low, tuple(end - start for start, end in zip(low, high, strict=True)))


@dataclass(frozen=True)
class Copy:
    """The source's bits."""


@dataclass(frozen=True)
class Zero:
    """Zeros."""


@dataclass(frozen=True)
class Divide:
    """source / by, in fp32."""

    by: int


@dataclass(frozen=True)
class Stream:
    """What a clone's noise is a function of, with the element's index in its (layer, expert)
    tensor.

    Attributes:
        seed: the plan's seed.
        tensor: the logical tensor, see `Key.tensor`.
        layer: target decoder layer, None for a tensor of an MTP module.
        expert: target expert.
    """

    seed: int
    tensor: str
    layer: int | None
    expert: int


@dataclass(frozen=True)
class Noise:
    """source + N(0, (alpha * sigma)^2).

    Attributes:
        alpha: noise scale, in units of sigma.
        stream: which noise.
        scope: box of the source tensor over which sigma, the standard deviation, is taken: one
            projection of one expert, or the router matrix of one layer.
        lead: leading axes of the source tensor, layer and expert, that the stream names; noise goes
            by the element's index in the axes behind them.
    """

    alpha: float
    stream: Stream
    scope: Box
    lead: int


@dataclass(frozen=True)
class Park:
    """(source - (highest - lowest of `scope`)) - PARKING_DISTANCE, in fp64.

    Below every original, and clones among themselves as originals are: balance between experts,
    which these biases keep, is kept between their clones.

    Attributes:
        scope: box of the source tensor that holds the biases of one layer's experts.
    """

    scope: Box


Transform = Copy | Zero | Divide | Noise | Park


@dataclass(frozen=True)
class Piece:
    """Part of a target tensor and what makes it.

    Attributes:
        target: where it lies in the target tensor.
        source_key: checkpoint key of the source tensor.
        source: where its source lies in that tensor; as many elements as `target`, in the same
            order. Its rank is one less or more than the target's where only one of the two stacks
            its layers.
        transform: how the one becomes the other.
    """

    target: Box
    source_key: str
    source: Box
    transform: Transform
