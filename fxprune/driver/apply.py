"""A plan that somebody gives, carried out: read, stated in the pipeline so that its text replays it, errors at its
lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from .. import registry
from ..errors import PlanError
from ..ir.group import Kind
from ..ir.plan import CompressionPlan
from ..request.goal import Goal, default_criterion
from .decide import Decided
from .proof import prove_prepared
from .rotation import rotation_of
from .run import Run, find_groups

PlanLike: TypeAlias = CompressionPlan | str | os.PathLike[str]


def apply_plan(run: Run, plan: CompressionPlan, recover: str = "none") -> Decided:
    """The opened model with ``plan`` as its plan, and recovered on its calibration data where that is asked for.

    Raises PlanError naming the group where the plan does not fit, and the line where the plan is a file.
    """
    merging = plan.tokens
    unmerge = merging is not None and merging.unmerge
    run = find_groups(run, plan.kinds, merging is not None, unmerge, plan.basis, rotation_of(run, plan))
    tell_of_basis(run, plan)
    run = prove_prepared(run)
    how = Goal(None, default_criterion(None), (), 1, recover).recovery
    with lines_of(plan):
        return give_plan(run, plan).recover(how)


def give_plan(run: Run, plan: CompressionPlan) -> Decided:
    """The run, whose groups are known, with ``plan`` as a pass of the pipeline states it."""
    from ..passes.search.read_plan import ReadPlan

    run = run.through(ReadPlan(plan.digest, plan))
    tell_of_odd_counts(run, plan)
    return Decided(run, run.program)


@contextmanager
def lines_of(plan: CompressionPlan | None) -> Iterator[None]:
    """Errors of a token site, which knows nothing of the file that the plan was read from, get its line."""
    try:
        yield
    except PlanError as error:
        found = re.fullmatch(r"site '(.+)'", error.where)
        if found is None or plan is None or plan.source is None:
            raise
        where = plan.place(found[1])
        raise PlanError(error.what, where=where, why=error.why, cure=error.cure) from None


def tell_of_basis(run: Run, plan: CompressionPlan) -> None:
    """A basis that was made by data is another one where there is none."""
    if plan.basis == "data" and run.data is None:
        run.tell.warn(
            "the plan cuts query, key and value widths in a basis by data, and there is none here: the basis is by "
            "weights alone. For that of the plan, compile with the plan and its data"
        )


def tell_of_odd_counts(run: Run, plan: CompressionPlan) -> None:
    """A plan may keep any count; what the target's kernels do not like is said."""
    backend = run.request.backend
    step = backend.granularity
    odd = [
        f"{name} ({len(c.keep)} of {c.size})"
        for name, c in sorted(plan.elements.items())
        if c.kind in (str(Kind.FFN), str(Kind.CHANNEL))
        and len(c.keep) % step
        and len(c.keep) != c.size
        and c.size >= 2 * step
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if odd[3:] else ""
        run.tell.note(
            f"the plan keeps counts that are no multiples of {step}, which {backend.name} likes: "
            f"{', '.join(odd[:3])}{more}"
        )


def read_plan(plan: PlanLike) -> CompressionPlan:
    """The plan itself, from wherever it lies. Raises PlanError for a kind that nobody knows."""
    found = plan if isinstance(plan, CompressionPlan) else CompressionPlan.read(os.fspath(plan))
    if not registry.KINDS.keys() >= set(found.kinds):
        found.check_kinds(registry.names("kind"))
    return found
