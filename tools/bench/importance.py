"""The command of compile/importance.py: what trajectory importance costs."""

from start import start

start("compile.importance")
