"""``fxprune sweep``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.cost import METRICS
from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "score once, compress to several ratios, draw the front of accuracy and cost, pick the smallest good one"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...workflows.sweep import Judging, Timing, budgets, sweep

    asked = arguments.call_of(args)
    ratios = budgets({name: asked.pop(name) for name in METRICS})
    judging = Judging(asked.pop("judge"), **{n: asked.pop(n) for n in ("held_out", "max_drop", "bisect")})
    timing = Timing(asked.pop("batches"), asked.pop("seconds"))
    out = Path(args.out) if args.out else arguments.out_dir(args).with_name(f"{arguments.out_dir(args).name}-sweep")
    result = sweep(**{**asked, "out": out}, ratios=ratios, judging=judging, timing=timing, on_event=screen.tell)
    screen.show_sweep(result, str(out))
    return {"out": str(out), **result}
