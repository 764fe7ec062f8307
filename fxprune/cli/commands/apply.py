"""``fxprune apply``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "apply a plan to a model, or to another checkpoint of the same architecture"


def options(p: Parser) -> None:
    """What the command line takes."""
    arguments.model(p)
    p.add_argument("--plan", metavar="FILE", required=True, help="what `fxprune plan` wrote")
    p.add_argument(
        "--align",
        action="append",
        default=[],
        metavar="N|PATTERN=N",
        help=("refuse counts that are no multiples (default: every count goes)"),
    )
    arguments.timed(p)
    arguments.target(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...driver import api

    artifact = api.apply(
        args.model,
        args.plan,
        target=args.target,
        out=arguments.out_dir(args),
        on_event=screen.tell,
        align=tuple(args.align) or 1,
        **arguments.timing(args),
        **arguments.source(args),
    )
    screen.artifact(artifact)
    return {"artifact": str(artifact.path), "report": artifact.report}


exit_code = arguments.finished
