"""The command of gpu/gpu.py: all that this project has to show on a GPU."""

from start import start

start("gpu.gpu")
