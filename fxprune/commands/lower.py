"""``fxprune lower``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import arguments
from .parser import Parser

if TYPE_CHECKING:
    from ..show import Screen

HELP = "lower an artefact to another target, or finish it on the machine that has what its target needs"


def options(p: Parser) -> None:
    """What the command line takes."""
    p.add_argument("artifact", metavar="ARTIFACT", help="a directory that compile wrote")
    p.add_argument("--target", metavar="NAME", help=(
        "eager, onnx, inductor, trt or triton, with options as 'trt{dtype=fp16}' (default: what it was made for)"))
    p.add_argument("--out", metavar="DIR", help="where the result goes (default: it replaces ARTIFACT)")
    arguments.output(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ..lower import lower

    artifact = lower(args.artifact, target=args.target, out=args.out, on_event=screen.tell)
    screen.artifact(artifact)
    return {"artifact": str(artifact.path), "report": artifact.report}


exit_code = arguments.finished
