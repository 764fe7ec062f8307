"""The commands, one file each: ``HELP``, ``options(parser)`` and ``run(args, screen)``. Add a name, add a file.

A command may also say ``SHARED = True`` (torchrun may run it on several ranks), and ``exit_code(result)``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

COMMANDS = (
    "compile",
    "plan",
    "apply",
    "inspect",
    "sweep",
    "sensitivity",
    "report",
    "explain",
    "lower",
    "export",
    "verify",
    "bench",
    "tune",
    "demo",
    "help",
    "doctor",
)


def command(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"{__name__}.{name}")
