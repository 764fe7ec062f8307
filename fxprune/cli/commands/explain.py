"""``fxprune explain``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "say why elements of a group went: scores, ranks, threshold, cost, floor, and what recovery did"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...artifact.explain import explain

    asked = arguments.values_of(args)
    if asked["top"] < 0:
        raise OptionError("a count cannot be negative", where=f"--top {asked['top']}")
    result = explain(args.artifact, args.group)
    screen.show_explanation(result, asked["top"])
    return result
