"""Writing the grown checkpoint: a copy, or links to the base with what differs."""

from megatron_growth.checkpoint.write.crew import Crew
from megatron_growth.checkpoint.write.grow import Draft, Mode, Written, grow

__all__ = ["Crew", "Draft", "Mode", "Written", "grow"]
