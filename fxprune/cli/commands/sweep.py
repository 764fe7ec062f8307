"""``fxprune sweep``."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "score once, compress to several ratios, draw the front of accuracy and cost, pick the smallest good one"


def options(p: Parser) -> None:
    """What the command line takes."""
    arguments.model(p)
    arguments.budget(p, timed=False)
    group = p.add_argument_group("sweep (budgets are ratios: --flops 0.9,0.75,0.6,0.5,0.4)")
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="X",
        help=(
            "pick the smallest that loses at most so much accuracy (0.01 is a point), or agreement with the dense "
            "model "
            "where there are no labels; ratios between the given ones are tried as well"
        ),
    )
    group.add_argument("--bisect", type=int, default=3, metavar="N", help="how many of them (default: %(default)s)")
    group.add_argument(
        "--judge",
        metavar="DATA",
        help=("data to judge on, such as a test split; by default a part of --data that nothing else sees"),
    )
    group.add_argument("--held-out", type=float, default=0.25, metavar="SHARE", help="that part (default: %(default)s)")
    group.add_argument("--batches", default="1", metavar="N,N", help="batch sizes to time (default: %(default)s)")
    group.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help=("time per point and batch size, all points in turns; 0 times nothing (default: %(default)s)"),
    )
    group.add_argument("--sensitivity", action="store_true", help="also measure what cutting each layer alone does")
    arguments.decision(p)
    p.add_argument("--recover", metavar="HOW", help="as in compile (default: auto)")
    arguments.target(p)


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...workflows.sweep import Judging, Timing, budgets, sweep

    if args.rounds != 1:
        raise OptionError("a sweep scores once", where=f"--rounds {args.rounds}", cure="leave it away")
    chosen = {**arguments.decisions(args), **arguments.source(args)}
    ratios = budgets({name: chosen.pop(name) for name in ("flops", "params", "bytes")})
    del chosen["rounds"]
    for option in chosen.keys() - inspect.signature(sweep).parameters.keys():
        value = chosen.pop(option)
        if value:
            raise OptionError(
                f"--{option} cannot be swept",
                where=f"--{option} {value}",
                cure="compile once per ratio and compare with fxprune report",
            )
    batches = arguments.batch_sizes(args.batches, "--batches")
    out = Path(args.out) if args.out else arguments.out_dir(args).with_name(f"{arguments.out_dir(args).name}-sweep")
    result = sweep(
        args.model,
        ratios=ratios,
        out=out,
        recover=args.recover,
        target=args.target,
        judging=Judging(args.judge, args.held_out, max_drop=args.max_drop, bisect=args.bisect),
        timing=Timing(batches, args.seconds),
        sensitive=args.sensitivity,
        on_event=screen.tell,
        **chosen,
    )
    screen.swept(result, str(out))
    return {"out": str(out), **result}
