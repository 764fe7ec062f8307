"""``fxprune bench``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "measure latency and throughput, interleaved, in one run"


def options(p: Parser) -> None:
    """What the command line takes."""
    p.add_argument("artifact", metavar="ARTIFACT", help="a directory that compile wrote")
    p.add_argument("--against", metavar="MODEL", help="another artefact, or a model, lowered to the same target")
    p.add_argument(
        "--record",
        action="store_true",
        help=("write what was measured into ARTIFACT's report and page; --against is then the dense model"),
    )
    p.add_argument("--batch", default="1,32", metavar="N,N", help="batch sizes (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=5.0, help="time to spend per batch size (default: %(default)s)")
    p.add_argument("--checkpoint", metavar="FILE", help="weights for --against")
    p.add_argument("--input", metavar="SHAPE|FILE", help="example inputs for --against")
    p.add_argument("--trust-pickle", action="store_true", help="allow --against to run code from its pickle")
    arguments.config(p)
    arguments.output(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...workflows.bench import bench

    result = bench(
        args.artifact,
        against=args.against,
        batches=arguments.batch_sizes(args.batch, "--batch"),
        seconds=args.seconds,
        threads=args.threads or 0,
        recorded=args.record,
        on_event=screen.tell,
        **arguments.source(args),
    )
    screen.bench(result)
    if args.record:
        screen.say([f"recorded  {args.artifact}"])
    return result
