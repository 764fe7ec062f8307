"""Choices of kinds that bring passes of their own: who finds such things, and a program as a plan leaves it of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from .. import registry
from ..ir.group import lies_inside
from ..ir.pipeline import Pass, Pipeline
from ..ir.plan import CompressionPlan
from ..ir.program import FACTS, Program


def finders_of(kinds: Iterable[str]) -> tuple[Pass, ...]:
    """The passes that find what there is of these kinds beside axes, tokens and tiles."""
    brought = [k for k in dict.fromkeys(map(str, kinds)) if registry.brings_passes(k)]
    return tuple(find() for find in dict.fromkeys(registry.kind(k).find for k in brought))


def appliers(plan: CompressionPlan) -> dict[tuple[str, ...], Pass]:
    """Kinds -> the pass that carries out what the plan cuts of them, for the same kinds."""
    cut = dict.fromkeys(c.kind for c in plan.elements.values() if not c.whole)
    by_pass: dict[type[Pass], list[str]] = {}
    for kind in filter(registry.brings_passes, cut):
        by_pass.setdefault(registry.kind(kind).apply, []).append(kind)
    return {tuple(kinds): apply() for apply, kinds in by_pass.items()}


def subtract_kinds(plan: CompressionPlan, kinds: Collection[str], program: Program) -> CompressionPlan:
    """The plan once its choices of ``kinds`` are carried out on ``program``, whose groups are known: what lay inside is
    gone with it."""
    gone = lies_inside(program.need("groups"), plan.elements)
    rest = {n: c for n, c in plan.elements.items() if c.kind not in kinds and n not in gone}
    return plan.with_elements(rest)


def drop_parts(program: Program, finders: Sequence[Pass] = ()) -> Program:
    """The program with these choices of its plan carried out, its groups found again, the rest of the plan and the
    scores on them; as it is where there are none. No step of a run: a trial of a plan leads to no result.

    finders   what finds the groups, where their limits matter: a search is to keep to them
    """
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.analysis.propagate_axes import PropagateAxes

    for kinds, one in appliers(program.need("plan")).items():
        rest, known = subtract_kinds(program.need("plan"), kinds, program), (g.kind for g in program.need("groups"))
        loose = (FindGroups(align=1, floor=0.0, allow_empty=True), *finders_of(known))
        again = (PropagateAxes(), *(finders or loose))
        found = Pipeline((one, *again), start=FACTS).run(program)
        program = found.in_bases_of(program).but(plan=rest, scores=program.scores)
    return program


def carry_out(program: Program) -> Program:
    """The program sliced by its plan, whose tokens are reduced already."""
    from ..passes.transform.slice_axes import SliceAxes

    return SliceAxes().run(drop_parts(program))
