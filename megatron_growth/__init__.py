"""Grow a Mixture-of-Experts checkpoint while Megatron loads it, and train on.

GrowthConfig          what to grow
GrowthPlan            which source box and transform make each target box
GrowthStorageReader   the grown checkpoint, to any torch DCP loader
"""

from megatron_growth.checkpoint.reader import GrowthStorageReader
from megatron_growth.config import GrowthConfig
from megatron_growth.planning.plan import GrowthPlan

__all__ = ["GrowthConfig", "GrowthPlan", "GrowthStorageReader"]
