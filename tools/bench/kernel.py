"""The command of blocks/kernel.py: the block-sparse kernel on a GPU."""

from start import start

start("blocks.kernel")
