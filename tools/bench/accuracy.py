"""The command of accuracy/accuracy.py: accuracy kept at equal cost."""

from start import start

start("accuracy.accuracy")
