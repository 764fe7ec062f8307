"""The commands, one file each: ``HELP`` and ``run(args, screen)``; their options are in the table that
:mod:`fxprune.request.options` is. Add a name, add a file.

A command may also say ``SHARED = True`` (torchrun may run it on several ranks), and ``exit_code(result)``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ..arguments import add_options
from ..parser import EPILOG, Parser

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


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of every command, by name, and the one above them."""
    from ... import __version__

    top = Parser(
        prog="fxprune",
        epilog=EPILOG,
        description=("Make a pretrained model smaller and faster: fxprune compile model.pt --target onnx --flops 0.5"),
    )
    top.add_argument("--version", action="version", version=f"fxprune {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    made: dict[str, Parser] = {}
    for name in COMMANDS:
        one = command(name)
        made[name] = commands.add_parser(name, help=one.HELP, description=one.HELP, epilog=EPILOG)
        add_options(made[name], name)
    return top, made
