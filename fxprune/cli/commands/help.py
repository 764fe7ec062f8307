"""``fxprune help``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import COMMANDS

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "pages about methods, targets, budgets, troubleshooting and more"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Print the page on stdout, for a pager; the result is what ``--json`` prints instead."""
    from ..help import TOPICS, contents, page

    if args.topic in COMMANDS:
        from . import build_parser

        text = build_parser()[1][args.topic].format_help()
    else:
        text = contents() if args.topic is None else page(args.topic)
    if not args.json:
        print(text, end="")
    return {"topic": args.topic, "topics": TOPICS, "text": text}
