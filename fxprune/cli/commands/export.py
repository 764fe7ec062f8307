"""``fxprune export``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "apply a plan, lower it, check it against limits and write a signed-off delivery: for release pipelines"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...artifact.gates import Limits
    from ...workflows.export import export

    asked = arguments.call_of(args)
    limits = Limits(**{f.name: asked.pop(f.name) for f in fields(Limits)})
    manifest = export(**asked, limits=limits, on_event=screen.tell)
    screen.show_delivery(manifest, args.out)
    return manifest


def exit_code(result: dict[str, Any]) -> int:
    """0 passed, 3 a gate failed, 4 a target or a gate could not be finished on this machine."""
    from ...artifact import gates

    return gates.exit_code(result["status"])
