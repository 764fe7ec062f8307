"""``fxprune sensitivity``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "measure what cutting each layer, or each kind of layers, alone does to the outputs"


def options(p: Parser) -> None:
    """What the command line takes."""
    arguments.model(p)
    group = p.add_argument_group("sensitivity")
    group.add_argument("--data", metavar="DATA", required=True, help="as in compile; labels are not used")
    group.add_argument("--samples", type=int, default=64, metavar="N", help="samples of it (default: %(default)s)")
    group.add_argument("--shares", default="0.75,0.5,0.25", metavar="S,S", help="what is kept (default: %(default)s)")
    group.add_argument(
        "--importance",
        metavar="NAME",
        default="trajectory",
        help=("criterion that says which elements stay (default: %(default)s)"),
    )
    group.add_argument("--prune", metavar="KINDS", help="kinds (default: heads,ffn,channels)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: %(default)s)")
    arguments.limits(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...workflows.sweep import measured_sensitivity

    try:
        shares = tuple(float(s) for s in args.shares.split(","))
    except ValueError:
        raise OptionError(
            f"'{args.shares}' is not a list of shares", where=f"--shares {args.shares}", cure="write 0.75,0.5,0.25"
        ) from None
    result = measured_sensitivity(
        args.model,
        data=args.data,
        samples=args.samples,
        shares=shares,
        importance=args.importance,
        prune=args.prune,
        seed=args.seed,
        on_event=screen.tell,
        **arguments.limits_of(args),
        **arguments.source(args),
    )
    screen.sensitivity(result)
    return result
