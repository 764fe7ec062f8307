"""``fxprune tune``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "measure block-sparse layers on this machine, for the gate and the kernel to go by"


def options(p: Parser) -> None:
    """What the command line takes."""
    p.add_argument("--target", default="triton", metavar="NAME", help="triton or onnx (default: %(default)s)")
    p.add_argument("--shapes", metavar="NxK,..", help="layers, outputs x inputs (default: those of DeiT-S and DeiT-B)")
    p.add_argument("--rows", metavar="M,M", help="rows they are applied to (default: 197, 1576, 12608)")
    p.add_argument("--blocks", metavar="TILE,..", help="tiles (default: all that the kernel knows)")
    p.add_argument("--density", metavar="D,D", help="shares of tiles that are kept (default: 0.1,0.25,0.5,0.75)")
    p.add_argument("--dtype", default="", help="default: bfloat16 for triton, float32 for onnx")
    p.add_argument("--out", metavar="FILE", help="where the table goes (default: kept under the device's name)")
    arguments.output(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...target import tune

    table, path = tune.tune(
        args.target,
        out=args.out,
        dtype=args.dtype,
        on_event=screen.tell,
        **tune.given(shapes=args.shapes, rows=args.rows, patterns=args.blocks, densities=args.density),
    )
    result = {"table": str(path), **tune.summary(table)}
    screen.tuned(result)
    return result
