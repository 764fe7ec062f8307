"""``fxprune demo``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "train a small ViT on handwritten digits, compress it, and compare; needs no network"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from .. import demo

    asked = arguments.call_of(args)
    result = demo.run(**{**asked, "threads": args.threads}, on_event=screen.tell)
    screen.show_demo(result)
    return result
