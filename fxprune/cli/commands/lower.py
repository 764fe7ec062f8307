"""``fxprune lower``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "lower an artefact to another target, or finish it on the machine that has what its target needs"


def options(p: Parser) -> None:
    """What the command line takes."""
    p.add_argument("artifact", metavar="ARTIFACT", help="a directory that compile wrote")
    p.add_argument(
        "--target",
        metavar="NAME",
        help=(
            "eager, onnx, inductor, trt or triton, with options as 'trt{dtype=fp16}' (default: what it was made for)"
        ),
    )
    p.add_argument("--out", metavar="DIR", help="where the result goes (default: it replaces ARTIFACT)")
    group = p.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="DATA",
        help=(
            "calibration data, for targets that look at it: 'trt{dtype=fp16}' checks that float16 holds every value on "
            "it"
        ),
    )
    group.add_argument("--samples", type=int, default=128, metavar="N", help="samples of it (default: %(default)s)")
    arguments.timed(p)
    group = p.add_argument_group("the dense model, to be timed beside the result")
    group.add_argument("--against", metavar="MODEL", help="model.pt, model.pt2, a Hugging Face folder, or timm:NAME")
    group.add_argument("--checkpoint", metavar="FILE", help="weights for timm:NAME (.pt, .pth, .safetensors)")
    group.add_argument("--input", metavar="SHAPE|FILE", help="example inputs (default: as the artefact's)")
    group.add_argument("--trust-pickle", action="store_true", help="allow --against to run code from its pickle")
    arguments.output(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...workflows.lower import lower

    artifact = lower(
        args.artifact,
        target=args.target,
        out=args.out,
        data=args.data,
        samples=args.samples,
        against=args.against,
        on_event=screen.tell,
        **arguments.timing(args),
        **arguments.source(args),
    )
    screen.artifact(artifact)
    return {"artifact": str(artifact.path), "report": artifact.report}


exit_code = arguments.finished
