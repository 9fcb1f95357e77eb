"""What will be grown, derived purely: the standard library and `megatron_growth.errors`, nothing
else."""
