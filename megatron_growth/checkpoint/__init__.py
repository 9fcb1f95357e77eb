"""Reading and writing checkpoints through a plan: torch and its distributed checkpoint, never
Megatron."""
