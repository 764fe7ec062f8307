"""Zeros in tiles: accuracy by tile and allocation, and the kernel that runs them."""
