"""``fxprune demo``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "train a small ViT on handwritten digits, compress it, and compare; needs no network"


def options(p: Parser) -> None:
    """What the command line takes."""
    p.add_argument("--out", metavar="DIR", default="fxprune-out/demo", help="where to write (default: %(default)s)")
    p.add_argument("--flops", default="0.5", metavar="B", help="share of the MACs that stays (default: %(default)s)")
    p.add_argument("--epochs", type=int, default=15, help="training epochs (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of split, training and search (default: %(default)s)")
    arguments.output(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from .. import demo

    result = demo.run(
        args.out, flops=args.flops, epochs=args.epochs, seed=args.seed, threads=args.threads, on_event=screen.tell
    )
    screen.demo(result)
    return result
