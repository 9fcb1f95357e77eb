"""Writing the grown checkpoint: a copy, or links to the base with what differs."""

from megatron_growth.checkpoint.write.crew import Crew
from megatron_growth.checkpoint.write.draft import Draft, Mode
from megatron_growth.checkpoint.write.writer import Written, grow

__all__ = ["Crew", "Draft", "Mode", "Written", "grow"]
