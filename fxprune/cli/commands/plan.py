"""``fxprune plan``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "decide what to remove and write plan.json; the model is not changed"
SHARED = True  # torchrun may run it on several ranks


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...driver import api

    asked = arguments.call_of(args)
    program = api.plan(**asked, on_event=screen.tell)
    screen.show_plan(program, asked["out"])
    return {"plan_file": asked["out"], **json.loads(program.need("plan").to_json())}
