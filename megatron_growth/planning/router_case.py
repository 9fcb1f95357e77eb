"""A router and how it grows: what the rows of the tables in `router_tables.py` look at."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_growth.planning.experts import ExpertOrder
from megatron_growth.planning.router import Router

TopKMode = Literal["scale", "keep"]


@dataclass(frozen=True)
class Case:
    """A router and how it grows; what the rows of the tables look at."""

    router: Router
    m: int
    order: ExpertOrder
    top_k: TopKMode
    parked: bool = False

    @property
    def k(self) -> int:
        return self.router.top_k

    @property
    def g(self) -> int:
        return self.router.group_topk or 1

    @property
    def capacity(self) -> float:
        return self.router.capacity_factor or 0.0

    @property
    def scales(self) -> bool:
        return self.top_k == "scale"

    @property
    def keeps_active(self) -> bool:
        """Top-k stays and clones take tokens: what changes the function."""
        return not self.scales and not self.parked

    @property
    def groups_stay(self) -> bool:
        """Whether interleaved clones leave a token its groups.

        A group's score is the sum of its best k // g experts. With m times the experts in as many
        groups it is that of the best m * k // g, all clones of the same experts if this is m * (k
        // g): m * (k mod g) < g.
        """
        router = self.router
        return (
            not router.is_grouped
            or self.g == router.num_groups
            or self.m * (self.k % self.g) < self.g
        )

    @property
    def first_use(self) -> float:
        """Steps until a parked clone can be selected.

        Score and bias of a clone are behind its original's by the spread of the biases and 2, and
        within a token's choice by up to the spread and 1; a step brings the two nearer by twice the
        rate.
        """
        return 1 / (2 * self.router.bias_update_rate)

    @property
    def even_z_loss(self) -> float:
        """The coefficient that keeps the z-loss's gradient where all logits are 0, and L = ln E
        with them."""
        even = math.log(self.router.num_experts)
        return (self.router.z_loss_coeff or 0.0) * even / (even + math.log(self.m))
