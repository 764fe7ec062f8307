"""``fxprune compile``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import arguments

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "compress a model to a budget and write a verified artefact"
SHARED = True  # torchrun may run it on several ranks


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...driver import api

    asked = {**arguments.call_of(args), "out": arguments.out_dir(args)}
    artifact = api.compile(**asked, on_event=screen.tell)
    screen.show_artifact(artifact)
    return {"artifact": str(artifact.path), "report": artifact.report}


exit_code = arguments.choose_exit_code
