"""``HoldToClass``: freeze what the model's own class cannot say, before anything is searched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import FxpruneError
from ...intake.load import Loaded
from ...ir.choice import Choice
from ...ir.group import PruneGroup, Switch
from ...ir.pipeline import Analysis
from ...ir.plan import CompressionPlan
from ...ir.program import Program
from ...passes.transform.slice_axes import SliceAxes
from ...target.parity import eager, inputs_that_run
from .config_numbers import KnownClass
from .fit import find_config_refusal, numbers_for, state_of
from .folder import SourceFolder, need_folder
from .ties import ClassTie, tie_groups


@dataclass(frozen=True)
class HoldToClass(Analysis):
    """Try on the class itself whether it takes what could be cut, and freeze what it does not.

    All groups are tried at once, each with another count: they are sliced off a copy, the class of transformers
    computes with what is left, and its outputs are compared with the graph's. Where it does not, those of one kind in
    the same place of every layer are tried by themselves.
    What a class takes so may be cut in any number, in every layer as it comes. Where a group could go entirely and the
    class cannot do without it, the least that stays is raised.

    layout  ``free``: as above · ``uniform``: groups that one number of the config speaks for are tied to one count, the
            class is built with that number, and groups that no number reaches are frozen
    kinds   that are tried; all where none is named

    Raises LoweringError where the model came from no Hugging Face folder: there is no class to go by.
    """

    needs = ("axes", "groups")
    gives = ("groups",)
    takes = ("source",)

    layout: str = "free"
    kinds: tuple[str, ...] = ()
    source: Loaded | None = field(default=None, repr=False, compare=False)

    def run(self, program: Program) -> Program:
        folder = need_folder(None if self.source is None else SourceFolder.of(self.source))
        flat, _ = inputs_that_run(program, eager(program.exported))
        program = program.but(groups=tuple(_without_switches(program.need("groups"), folder)))
        wanted = [g for g in program.need("groups") if not self.kinds or str(g.kind) in self.kinds]
        if self.layout == "uniform":
            return program.but(groups=_uniform(program, folder, wanted, flat))
        changed: dict[str, PruneGroup] = {}
        everywhere = [(g, _some(g, n)) for alike in _alike(wanted) for n, g in enumerate(alike)]
        fits = not _check_counts(program, folder, flat, everywhere)
        for alike in _alike(wanted):
            why = "" if fits else _check_counts(program, folder, flat, [(g, _some(g, n)) for n, g in enumerate(alike)])
            if why:
                said = f"{folder.class_name} cannot say it: {why}"
                changed |= {g.name: g.but(frozen=said) for g in alike}
                continue
            vanishing = [g for g in alike if g.floor == 0]
            if vanishing and _check_counts(program, folder, flat, [(g, 0) for g in vanishing]):
                changed |= {g.name: g.but(floor=min(g.size, g.granularity)) for g in vanishing}
        return program.but(groups=tuple(changed.get(g.name, g) for g in program.need("groups")))


def _without_switches(groups: Iterable[PruneGroup], folder: SourceFolder) -> Iterator[PruneGroup]:
    """The groups, those that are a whole part of the graph frozen: a class runs all that it builds."""
    why = f"{folder.class_name} cannot say it: it runs every part that it builds"
    yield from (g.but(frozen=why) if isinstance(g, Switch) and g.prunable else g for g in groups)


def _uniform(
    program: Program, folder: SourceFolder, wanted: Sequence[PruneGroup], flat: Sequence[Any]
) -> tuple[PruneGroup, ...]:
    """The program's groups with ties behind them, and frozen where no number of the config says their count, or the
    class with that number does not compute what the graph does."""
    known = KnownClass.of(folder.model)
    ties, refused = tie_groups(wanted, known, lambda tie: _check_tie(program, folder, known, flat, tie))
    said = {name: f"{folder.class_name} cannot say it: {why}" for name, why in refused.items()}
    return (*(g.but(frozen=said[g.name]) if g.name in said else g for g in program.need("groups")), *ties)


def _check_tie(program: Program, folder: SourceFolder, known: KnownClass, flat: Sequence[Any], tie: ClassTie) -> str:
    """Why the class, built with the numbers of a tie that is cut to its middle, does not compute what the graph does;
    "" if it does."""
    count = tie.counts[(len(tie.counts) - 1) // 2]
    try:
        small = _slice(program, [(g, count) for g in tie.tied])
        return find_config_refusal(small, known, tie.config_at(count), state_of(small, folder.model), flat)
    except FxpruneError as error:
        return error.what


def _alike(groups: Iterable[PruneGroup]) -> Iterator[list[PruneGroup]]:
    """Groups that may be cut, by kind and place: names but for their numbers."""
    found: dict[tuple[str, str], list[PruneGroup]] = {}
    for group in groups:
        if group.prunable:
            found.setdefault((str(group.kind), re.sub(r"\d+", "*", group.name)), []).append(group)
    yield from found.values()


def _some(group: PruneGroup, number: int) -> int:
    """A count to try: about half and about a quarter in turns, never none and never all."""
    share = 2 if number % 2 == 0 else 4
    return max(1, min(group.size - 1, group.size - group.size // share))


def _check_counts(
    program: Program, folder: SourceFolder, flat: Sequence[Any], counts: Sequence[tuple[PruneGroup, int]]
) -> str:
    """Why the class does not compute what the graph does where so many elements stay, the last ones; "" if it does."""
    try:
        small = _slice(program, counts)
        return numbers_for(small, folder.model, state_of(small, folder.model), flat, eager(small.exported)(flat))[1]
    except FxpruneError as error:
        return error.what


def _slice(program: Program, counts: Sequence[tuple[PruneGroup, int]]) -> Program:
    """The program where so many elements of these groups stay, the last ones."""
    choices = {g.name: Choice(str(g.kind), g.size, tuple(range(g.size - n, g.size))) for g, n in counts}
    return SliceAxes().run(program.but(plan=CompressionPlan(choices)))
