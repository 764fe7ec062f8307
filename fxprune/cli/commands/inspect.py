"""``fxprune inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "show what can be pruned, what cannot, and why"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...driver import api
    from ..lines import inspection

    if args.graph and Path(args.graph).suffix not in (".svg", ".dot"):
        raise OptionError("the graph can be drawn as .svg or .dot", where=f"--graph {args.graph}")
    program = api.inspect(**arguments.call_of(args), on_event=screen.tell)
    if args.graph:
        from ...report.coupling import draw

        draw(program, args.graph)
    screen.show_inspection(program, args.graph)
    return inspection(program)
