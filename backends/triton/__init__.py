"""Triton: block-sparse layers on NVIDIA GPUs, where a measured table says that they are faster than dense ones."""
