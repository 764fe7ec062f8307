"""The command of accuracy/few.py: how the guard of recovery chooses on few samples."""

from start import start

start("accuracy.few")
