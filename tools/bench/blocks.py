"""The command of blocks/blocks.py: zeros in tiles."""

from start import start

start("blocks.blocks")
