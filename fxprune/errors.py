"""Everything that can go wrong, told as what, where, why, cure.

``FxpruneError`` is the user's to mend (exit code 2; 4 where a device or tool is missing), ``PluginError`` that of a
plugin's author (2 as well), ``InternalError`` ours (exit code 70).

Texts name options as the command line does: ``where="--floor 0.3"``, and between backticks where words follow,
``cure="give `--data`, or `--recover none`"``. :func:`spell` says them as the door does that was used.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

REPORT_IT = (
    "this is a bug in fxprune: please open an issue in its tracker, with the lines above and what `fxprune doctor` says"
)
SPELLING: dict[str, str] = {}
"""Option on the command line -> in Python: ``head-scale`` -> ``head_scale=``; the table of options fills it in."""

_typed: ContextVar[bool] = ContextVar("typed", default=False)
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)(?:=| (?=\S))?")
_OPTION_VALUE = re.compile(r"--([a-z][a-z-]*)(?: (\S+))?")
_MARKED = re.compile(r"`(--[^`]*)`")


@contextmanager
def on_the_command_line() -> Iterator[None]:
    """Whoever reads messages from here on typed a command."""
    token = _typed.set(True)
    try:
        yield
    finally:
        _typed.reset(token)


def spell(text: str, bare: bool = False) -> str:
    """``text`` with its options as whoever reads it writes them: ``--floor`` on the command line, ``floor=`` in Python.

    bare   the whole text is code, such as a ``where``; else only what stands between backticks

    >>> spell("give `--data`, or `--recover none`"), spell("--head-scale 2", bare=True)
    ('give data=, or recover="none"', 'head_scale=2')
    >>> with on_the_command_line():
    ...     spell("give `--data`, or `--recover none`"), spell("--head-scale 2", bare=True)
    ('give --data, or --recover none', '--head-scale 2')
    """
    if _typed.get():
        return _MARKED.sub(r"\1", text)
    if bare:
        return _OPTION.sub(lambda match: SPELLING.get(match[1], match[0]), text)
    return _MARKED.sub(lambda match: _OPTION_VALUE.sub(_in_python, match[1]), text)


def _in_python(match: re.Match[str]) -> str:
    name, value = match[1], match[2] or ""
    if name not in SPELLING:
        return match[0]
    word = value and not value.startswith(("'", '"')) and not value.isupper()
    try:
        float(value)
    except ValueError:
        return SPELLING[name] + (f'"{value}"' if word else value)
    return SPELLING[name] + value


class FxpruneError(Exception):
    """A request that cannot be carried out, and what would mend it; options are spelt by :func:`spell`.

    what    one sentence: what failed
    where   file, node, option or layer at fault
    why     the fact that makes it fail
    cure    what the user can do next
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", why: str = "", cure: str = "") -> None:
        self.what, self.where, self.why, self.cure = spell(what), spell(where, bare=True), spell(why), spell(cure)
        lines = [self.what]
        for label, text in (("at", self.where), ("why", self.why), ("cure", self.cure)):
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


class ProcessDied(FxpruneError):
    """The process that did the work was ended by a signal: out of memory, or native code that crashed."""

    exit_code = 5


class InternalError(Exception):
    """A broken invariant of fxprune itself. Carries the pipeline text that reproduces it."""

    exit_code = 70

    def __init__(self, what: str, *, pipeline: str = "") -> None:
        self.what, self.pipeline = what, pipeline
        hint = f"\n  pipeline  {pipeline}" if pipeline else ""
        super().__init__(f"{what}{hint}\n  {REPORT_IT}")


def find_package(thing: object) -> str:
    """``package.module:Name`` of a class, a function or an object that another package brought; "" for fxprune's own.

    >>> find_package(FxpruneError), find_package(difflib.get_close_matches)
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
