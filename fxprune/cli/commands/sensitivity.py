"""``fxprune sensitivity``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "measure what cutting each layer, or each kind of layers, alone does to the outputs"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...workflows.sweep import measure_sensitivity

    result = measure_sensitivity(**arguments.call_of(args), on_event=screen.tell)
    screen.show_sensitivity(result)
    return result
