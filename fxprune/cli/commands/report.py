"""``fxprune report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import OptionError

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "compare artefacts side by side, or write the page of one again"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...artifact.compare import again, compare, render, rows_of
    from ...report.schema import REPORT

    if args.schema:
        args.json = True
        return REPORT
    if not args.artifacts:
        raise OptionError(
            "name at least one artefact", where="fxprune report", cure="give the --out of fxprune compile"
        )
    if args.out and Path(args.out).suffix != ".html":
        raise OptionError("a page is written as .html", where=f"--out {args.out}")
    result = compare(args.artifacts)
    if args.out:
        from ...process.files import write_text

        write_text(Path(args.out), again(Path(args.artifacts[0])) if len(args.artifacts) == 1 else render(result))
        result["page"] = args.out
    screen.show_comparison([a["name"] for a in result["artifacts"]], rows_of(result), args.out)
    return result
