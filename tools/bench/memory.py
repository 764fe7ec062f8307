"""The command of compile/memory.py: peak memory on a large language model."""

from start import start

start("compile.memory")
