"""``fxprune tune``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "measure block-sparse layers on this machine, for the gate and the kernel to go by"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...target import tune

    asked = arguments.values_of(args)
    table, path = tune.tune(
        asked["target"],
        out=asked["out"],
        dtype=asked["dtype"],
        on_event=screen.tell,
        **tune.drop_unset(
            shapes=asked["shapes"], rows=asked["rows"], patterns=asked["blocks"], densities=asked["density"]
        ),
    )
    result = {"table": str(path), **tune.summary(table)}
    screen.show_tuning(result)
    return result
