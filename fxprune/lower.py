"""``fxprune lower``: an artefact for another target, or finished on the machine that has what its target needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import registry
from .artifact import Artifact, check_destination
from .errors import OptionError
from .events import Event, OnEvent, warn_only
from .quiet import quiet


def lower(
    artifact: str | os.PathLike[str], *, target: str | None = None, out: str | os.PathLike[str] | None = None,
    on_event: OnEvent = warn_only,
) -> Artifact:
    """Lower and verify the pruned program that ``artifact`` holds; nothing is searched and no weight changes.

    target   as for :func:`fxprune.compile`; by default the one that the artefact was made for, with its options
    out      where the result goes; by default it replaces ``artifact``, whose old payload goes once this one is whole

    What this machine lacks is told as a warning, and in the report under ``unfinished``. Raises FxpruneError, and
    leaves the artefact as it was.
    """
    on_event(Event("stage", f"load {os.fspath(artifact)}"))
    made = Artifact.read(Path(artifact))
    backend = made.backend if target is None else registry.target(target)
    destination = Path(artifact) if out is None else Path(out)
    if out is not None and destination.exists() and Path(artifact).exists() and destination.samefile(artifact):
        raise OptionError("the output is the artefact itself", where=f"--out {destination}",
                          cure="leave --out away to replace it")
    check_destination(destination)
    made.backend = backend
    on_event(Event("stage", f"lower to {backend.text}, verify and save"))
    with quiet():
        made.save(destination)
    for missing in missing_of(made.report):
        on_event(Event("warning", f"not finished: {missing}"))
    return made


def missing_of(report: dict[str, Any]) -> list[str]:
    """What the machine lacked that lowered this artefact, in words."""
    return list((report.get("unfinished") or {}).get("missing", ()))
