"""The command of zoo/zoo.py: every model at its real size."""

from start import start

start("zoo.zoo")
