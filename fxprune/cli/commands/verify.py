"""``fxprune verify``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "check a delivery again, from its files alone: hashes, parity and every gate"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...workflows.verify import verify

    manifest = verify(**arguments.call_of(args), latency=not args.skip_latency, on_event=screen.tell)
    screen.show_delivery(manifest, args.delivery)
    return manifest


def exit_code(result: dict[str, Any]) -> int:
    """0 passed, 3 a gate failed, 4 a target or a gate could not be finished on this machine."""
    from ...artifact import gates

    return gates.exit_code(result["status"])
