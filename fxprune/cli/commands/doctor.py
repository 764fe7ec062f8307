"""``fxprune doctor``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "what this machine has, what each target needs, and what is wrong"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from .. import doctor

    result = doctor.examine(args.target)
    screen.say(doctor.lines(result))
    return {**result, "asked": args.target}


def exit_code(result: dict[str, Any]) -> int:
    """4 where the one target that was asked for lacks something."""
    asked = result["asked"]
    return 0 if asked is None or result["targets"][asked]["ready"] else 4
