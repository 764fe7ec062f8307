"""Choices of kinds that bring passes of their own: who finds such things, and a program as a plan leaves it of them."""

from __future__ import annotations

from collections.abc import Iterable

from .. import registry
from ..ir.group import lies_inside
from ..ir.pipeline import Pass, Pipeline
from ..ir.plan import CompressionPlan
from ..ir.program import FACTS, Program


def finders_of(kinds: Iterable[str]) -> tuple[Pass, ...]:
    """The passes that find what there is of these kinds beside axes, tokens and tiles."""
    return tuple(registry.kind(k).find() for k in dict.fromkeys(map(str, kinds)) if registry.brings_passes(k))


def appliers(plan: CompressionPlan) -> dict[str, Pass]:
    """Kind -> the pass that carries out what the plan cuts of it, for the same kinds."""
    kinds = dict.fromkeys(c.kind for c in plan.elements.values() if not c.whole)
    return {k: registry.kind(k).apply() for k in kinds if registry.brings_passes(k)}


def subtract_kind(plan: CompressionPlan, kind: str, program: Program) -> CompressionPlan:
    """The plan once its choices of ``kind`` are carried out on ``program``, whose groups are known: what lay inside is
    gone with it."""
    gone = lies_inside(program.need("groups"), plan.elements)
    rest = {n: c for n, c in plan.elements.items() if c.kind != kind and n not in gone}
    return plan.with_elements(rest)


def drop_parts(program: Program) -> Program:
    """The program with these choices of its plan carried out, its groups found again, the rest of the plan and the
    scores on them; as it is where there are none. No step of a run: a trial of a plan leads to no result."""
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.analysis.propagate_axes import PropagateAxes

    for kind, one in appliers(program.need("plan")).items():
        rest, known = subtract_kind(program.need("plan"), kind, program), (g.kind for g in program.need("groups"))
        again = (PropagateAxes(), FindGroups(align=1, floor=0.0, allow_empty=True), *finders_of(known))
        found = Pipeline((one, *again), start=FACTS).run(program)
        program = found.in_bases_of(program).but(plan=rest, scores=program.scores)
    return program


def carry_out(program: Program) -> Program:
    """The program sliced by its plan, whose tokens are reduced already."""
    from ..passes.transform.slice_axes import SliceAxes

    return SliceAxes().run(drop_parts(program))
