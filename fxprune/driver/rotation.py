"""When residual streams are put into a basis of their own, and when again: for a search, and for a plan that somebody
gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PlanError
from ..ir.group import Kind
from ..ir.plan import CompressionPlan
from ..request.goal import Goal
from .run import Run

if TYPE_CHECKING:
    from ..passes.transform.rotate_width import RotateWidth


def has_bases(goal: Goal) -> bool:
    """Whether any of the goal's kinds is cut in a basis of its own."""
    return not {str(Kind.QK), str(Kind.V), str(Kind.WIDTH)}.isdisjoint(map(str, goal.kinds))


def rotation_for(run: Run, goal: Goal) -> RotateWidth | None:
    """The pass that finds the bases, where widths may be cut; None, with a note, where there is no data for it.

    Where parameters are what the budget is of, no tensor may become two.
    """
    from ..passes.transform.rotate_width import RotateWidth

    if not goal.by_groups or str(Kind.WIDTH) not in map(str, goal.group_kinds):
        return None
    if run.data is None:
        run.tell.note("width is cut in the model's own basis: there is no data to find a better one by")
        return None
    return RotateWidth(untie=goal.budget is None or goal.budget.metric not in ("params", "bytes"))


def rotation_of(run: Run, plan: CompressionPlan) -> RotateWidth | None:
    """The pass that finds the basis that elements of ``plan`` are directions of; None where it cuts none.

    The plan says how many directions stay, the data of the run which they are. Raises PlanError where there is none.
    """
    from ..passes.transform.rotate_width import RotateWidth

    cut = plan.rotated
    if not cut:
        return None
    if run.data is None:
        raise PlanError(
            "the plan cuts a width in a basis that is found from data, and there is none",
            where=f"group '{cut[0]}'",
            why="its elements are the directions along which the norms see most, best first",
            cure="compile with the plan and `--data`: samples like those that the plan was made with",
        )
    return RotateWidth()
