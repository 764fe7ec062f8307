"""``fxprune plan``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "decide what to remove and write plan.json; the model is not changed"
SHARED = True  # torchrun may run it on several ranks


def options(p: Parser) -> None:
    """What the command line takes."""
    arguments.model(p)
    arguments.budget(p)
    arguments.decision(p)
    arguments.held_out(p)
    p.add_argument("--out", metavar="FILE", default="plan.json", help="where to write the plan (default: %(default)s)")


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...driver import api

    program = api.plan(
        args.model,
        out=args.out,
        held_out=args.held_out,
        on_event=screen.tell,
        **arguments.decisions(args),
        **arguments.source(args),
    )
    screen.plan(program, args.out)
    return {"plan_file": args.out, **json.loads(program.need("plan").to_json())}
