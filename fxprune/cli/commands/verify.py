"""``fxprune verify``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "check a delivery again, from its files alone: hashes, parity and every gate"


def options(p: Parser) -> None:
    """What the command line takes."""
    p.add_argument("delivery", metavar="DIR", help="what `fxprune export` wrote")
    p.add_argument(
        "--data",
        metavar="DATA",
        help=(
            "the data that the delivery was judged by, where it does not carry all of it: .npz, .pt or .safetensors of "
            "tensors, or python:module:function"
        ),
    )
    p.add_argument("--skip-latency", action="store_true", help="on a machine that is not the one the limit is about")
    p.add_argument("--seconds", type=float, default=2.0, help="time to measure latency for (default: %(default)s)")
    p.add_argument("--junit", metavar="FILE", help="write the gates as a JUnit report as well")
    arguments.output(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...workflows.verify import verify

    manifest = verify(
        args.delivery,
        data=args.data,
        latency=not args.skip_latency,
        seconds=args.seconds,
        junit_file=args.junit,
        on_event=screen.tell,
    )
    screen.delivery(manifest, args.delivery)
    return manifest


def exit_code(result: dict[str, Any]) -> int:
    """0 passed, 3 a gate failed, 4 a target or a gate could not be finished on this machine."""
    from ...artifact import gates

    return gates.exit_code(result["status"])
