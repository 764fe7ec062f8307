"""The command of compile/whole.py: the whole command on a real model."""

from start import start

start("compile.whole")
