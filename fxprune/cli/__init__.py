"""The command line: commands, help and what people see on the screen."""

from .entry import main, start

__all__ = ["main", "start"]
