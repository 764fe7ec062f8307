"""Everything that can go wrong, told as what, where, why, cure.

``FxpruneError`` is the user's to mend (exit code 2; 4 where a device or tool is missing), ``PluginError`` that of a
plugin's author (2 as well), ``InternalError`` ours (exit code 70).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

REPORT_IT = (
    "this is a bug in fxprune: please open an issue in its tracker, with the lines above and what `fxprune doctor` says"
)


class FxpruneError(Exception):
    """A request that cannot be carried out, and what would mend it.

    what    one sentence: what failed
    where   file, node, option or layer at fault
    why     the fact that makes it fail
    cure    what the user can do next
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", why: str = "", cure: str = "") -> None:
        self.what, self.where, self.why, self.cure = what, where, why, cure
        lines = [what]
        for label, text in (("at", where), ("why", why), ("cure", cure)):
            if text:
                lines.append(f"  {label:<5} {text}")
        super().__init__("\n".join(lines))


class LoadError(FxpruneError):
    """A model, checkpoint, plan or data file that cannot be read, or must not be."""


class CaptureError(FxpruneError):
    """``torch.export`` could not turn the model into a graph."""


class UnsupportedOp(FxpruneError):
    """An op that no rule or backend knows stands in the way of the request."""


class BudgetInfeasible(FxpruneError):
    """No plan within the allowed floors meets the budget, or the budget itself makes no sense."""


class NothingToPrune(FxpruneError):
    """Every axis of the model is frozen; returning a silent copy would be a lie."""


class PlanError(FxpruneError):
    """A plan that does not fit the program it is applied to."""


class VerifyError(FxpruneError):
    """An artefact does not compute what the pruned graph computes."""


class LoweringError(FxpruneError):
    """A backend could not turn the program into its payload."""


class OptionError(FxpruneError):
    """An option or name that fxprune does not know, or a value out of range."""


class PluginError(FxpruneError):
    """What a plugin brought broke an invariant: its author's to mend."""

    def __init__(self, what: str, *, by: str, why: str, where: str = "") -> None:
        package = by.partition(":")[0].partition(".")[0]
        super().__init__(
            what,
            where=f"{by}, {where}" if where else by,
            why=why,
            cure=f"this is no bug of fxprune: report it to the authors of {package}, or leave it out",
        )


class MissingDevice(FxpruneError):
    """The machine lacks the device that the request is about: nothing is wrong with the request."""

    exit_code = 4


class InternalError(Exception):
    """A broken invariant of fxprune itself. Carries the pipeline text that reproduces it."""

    exit_code = 70

    def __init__(self, what: str, *, pipeline: str = "") -> None:
        self.what, self.pipeline = what, pipeline
        hint = f"\n  pipeline  {pipeline}" if pipeline else ""
        super().__init__(f"{what}{hint}\n  {REPORT_IT}")


def brought_by(thing: object) -> str:
    """``package.module:Name`` of a class, a function or an object that another package brought; "" for fxprune's own.

    >>> brought_by(FxpruneError), brought_by(difflib.get_close_matches)
    ('', 'difflib:get_close_matches')
    """
    one = thing if hasattr(thing, "__qualname__") else type(thing)
    module = str(getattr(one, "__module__", ""))
    return "" if module.partition(".")[0] == "fxprune" else f"{module}:{one.__qualname__}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A cure line for an unknown name: the closest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listing = "known: " + ", ".join(names)
    return f"did you mean '{close[0]}'? ({listing})" if close else listing
