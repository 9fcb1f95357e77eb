"""`python -m megatron_growth`, for launchers that start modules: `torchrun ... -m megatron_growth
grow ...`."""

from megatron_growth.cli import main

if __name__ == "__main__":
    main()
