"""What heads are worth against neurons, tried on the data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..data.batch import Calibration
from ..ir.program import Program
from ..process import ranks
from .parts import carry_out

if TYPE_CHECKING:
    from ..passes.search.search_plan import SearchPlan

SWEPT = 128  # samples that head scales are compared on


def best_scale(program: Program, search: SearchPlan, data: Calibration) -> tuple[float, str]:
    """The head scale whose plan, without recovery, keeps the outputs closest to the dense ones; and what was found."""
    from ..passes.analysis.importance.damage import Reference, divergences
    from ..passes.analysis.importance.obs import first
    from ..passes.search.search_plan import HEAD_SCALES, HEADS

    if not any(g.prunable and g.kind in HEADS for g in program.need("groups")):
        return search.head_scale, "head scale: there are no heads to weigh"
    batches, found, dense = first(data.batches, SWEPT), {}, Reference(program)
    for scale in HEAD_SCALES:
        small = carry_out(replace(search, head_scale=scale).run(program))
        found[scale] = float(ranks.agree({"kept": divergences(dense, small, batches).mean()})["kept"])
    best = min(found, key=lambda scale: (found[scale], abs(scale - 1.0)))
    told = ", ".join(f"{scale:g}: {value:.3g}" for scale, value in found.items())
    return best, f"head scale {best:g} (divergence of the outputs by scale: {told})"
