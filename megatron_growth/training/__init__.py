"""The only package that imports Megatron: its seam, its entry points, its loop on CPU."""
