"""``fxprune explain``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "say why elements of a group went: scores, ranks, threshold, cost, floor, and what recovery did"


def options(p: Parser) -> None:
    """What the command line takes."""
    p.add_argument("artifact", metavar="ARTIFACT", help="a directory that compile wrote")
    p.add_argument("group", metavar="GROUP", help="a name from its report, e.g. blocks.0.mlp.fc1:ffn")
    p.add_argument(
        "--top",
        type=int,
        default=8,
        metavar="N",
        help=("elements listed on either side of the cut (default: %(default)s; --json has all)"),
    )
    arguments.output(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...artifact.explain import explain

    if args.top < 0:
        raise OptionError("a count cannot be negative", where=f"--top {args.top}")
    result = explain(args.artifact, args.group)
    screen.explained(result, args.top)
    return result
