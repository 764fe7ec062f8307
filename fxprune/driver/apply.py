"""A plan that somebody gives, carried out: read, stated in the pipeline so that its text replays it, errors at its
lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from ..errors import PlanError
from ..ir.group import Kind
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..process.events import Event
from ..request.goal import Wish, default_criterion
from .finish import finish
from .run import Work

if TYPE_CHECKING:
    from ..artifact.artifact import Artifact

PlanLike: TypeAlias = CompressionPlan | str | os.PathLike[str]
_SITE = re.compile(r"site '(.+)'")


def applied(work: Work, plan: CompressionPlan, recover: str = "none") -> Artifact:
    """The opened model cut as ``plan`` says, and recovered on its calibration data where that is asked for.

    Raises PlanError naming the group where the plan does not fit, and the line where the plan is a file.
    """
    merging = plan.tokens
    program = work.groups(
        [c.kind for c in plan.choices.values()], merging is not None, merging is not None and merging.unmerge
    )
    wish = Wish(None, default_criterion(None), (), 1, recover)
    with lines_of(plan):
        return finish(work, work.recover(with_plan(work, program, plan), wish))


def with_plan(work: Work, program: Program, plan: CompressionPlan) -> Program:
    """``program``, whose groups are known, with ``plan`` as a pass of the pipeline states it."""
    from ..passes.search.read_plan import ReadPlan

    program = work.run(program, ReadPlan(plan.digest, plan))
    tell_of_odd_counts(work, plan)
    return program


@contextmanager
def lines_of(plan: CompressionPlan | None) -> Iterator[None]:
    """Errors of a token site, which knows nothing of the file that the plan was read from, get its line."""
    try:
        yield
    except PlanError as error:
        found = _SITE.fullmatch(error.where)
        if found is None or plan is None or plan.source is None:
            raise
        where = f"{plan.source.at('tokens', 'removed', found[1])}: {error.where}"
        raise PlanError(error.what, where=where, why=error.why, cure=error.cure) from None


def tell_of_odd_counts(work: Work, plan: CompressionPlan) -> None:
    """A plan may keep any count; what the target's kernels do not like is said."""
    step = work.backend.granularity
    odd = [
        f"{name} ({len(c.keep)} of {c.size})"
        for name, c in sorted(plan.choices.items())
        if c.kind in (str(Kind.FFN), str(Kind.CHANNEL))
        and len(c.keep) % step
        and len(c.keep) != c.size
        and c.size >= 2 * step
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if odd[3:] else ""
        text = (
            f"the plan keeps counts that are no multiples of {step}, which {work.backend.name} likes: "
            f"{', '.join(odd[:3])}{more}"
        )
        work.notes.append(text)
        work.on_event(Event("note", text))


def read_plan(plan: PlanLike) -> CompressionPlan:
    """The plan itself, from wherever it lies."""
    return plan if isinstance(plan, CompressionPlan) else CompressionPlan.read(os.fspath(plan))
