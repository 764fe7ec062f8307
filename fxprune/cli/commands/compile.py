"""``fxprune compile``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "compress a model to a budget and write a verified artefact"
SHARED = True  # torchrun may run it on several ranks


def options(p: Parser) -> None:
    """What the command line takes."""
    arguments.model(p)
    arguments.budget(p)
    arguments.decision(p)
    arguments.held_out(p)
    p.add_argument(
        "--plan",
        metavar="FILE",
        help=("apply this plan.json instead of searching one; with --pipeline: what its read-plan takes"),
    )
    p.add_argument(
        "--recover",
        metavar="HOW",
        help=(
            "fit what stays to the dense model on the data: auto, ridge, refit, bias, scale, tune or none "
            "(default: auto with data, none without)"
        ),
    )
    arguments.timed(p, batch=False)
    arguments.target(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...driver import api

    artifact = api.compile(
        args.model,
        target=args.target,
        out=arguments.out_dir(args),
        plan=args.plan,
        recover=args.recover,
        seconds=args.seconds,
        held_out=args.held_out,
        on_event=screen.tell,
        **arguments.decisions(args),
        **arguments.source(args),
    )
    screen.artifact(artifact)
    return {"artifact": str(artifact.path), "report": artifact.report}


exit_code = arguments.finished
