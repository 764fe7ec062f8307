"""The command of compile/compile.py: seconds and memory of compiling, of the import."""

from start import start

start("compile.compile")
