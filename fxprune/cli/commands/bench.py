"""``fxprune bench``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "measure latency and throughput, interleaved, in one run"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...workflows.bench import bench

    result = bench(**arguments.call_of(args), on_event=screen.tell)
    screen.show_bench(result)
    if args.record:
        screen.say([f"recorded  {args.artifact}"])
    return result
