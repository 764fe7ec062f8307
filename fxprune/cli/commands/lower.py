"""``fxprune lower``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "lower an artefact to another target, or finish it on the machine that has what its target needs"


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...workflows.lower import lower

    artifact = lower(**arguments.call_of(args), on_event=screen.tell)
    screen.show_artifact(artifact)
    return {"artifact": str(artifact.path), "report": artifact.report}


exit_code = arguments.choose_exit_code
