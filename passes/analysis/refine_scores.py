"""``RefineScores``: what a search left in doubt is scored again, more exactly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...data.batch import Calibration
from ...ir.group import with_derived
from ...ir.pipeline import Analysis
from ...ir.program import Program
from .importance.criterion import Criterion
from .score_groups import check_data, criterion


@dataclass(frozen=True)
class RefineScores(Analysis):
    """Score the borderline elements of the plan exactly, where the criterion can (``Criterion.refine``).

    The plan stays what it was: search again afterwards. Criteria that have nothing better leave all scores alone.

    criterion   the one that made the scores: a name, or the object itself, which may remember what it found
    data        the calibration batches it scored with
    seed        the seed it scored with

    Errors   OptionError for an unknown name or missing data
    """

    takes = ("criterion", "data")
    needs = ("axes", "groups", "scores", "plan")
    gives = ("scores",)

    criterion: str | Criterion = "trajectory"
    data: Calibration | None = field(default=None, repr=False)
    seed: int = 0

    def runs(self) -> tuple[object, ...]:
        return (criterion(self.criterion) if isinstance(self.criterion, str) else self.criterion,)

    def run(self, program: Program) -> Program:
        chosen = criterion(self.criterion) if isinstance(self.criterion, str) else self.criterion
        check_data(chosen, self.data, "refine-scores", "give it what it scored with")
        found = chosen.refine(program, self.data if chosen.needs_data else None, self.seed)
        scores = dict(program.need("scores"))
        for name, values in found.items():
            scores[name] = replace(scores[name], values=values)
        return program.but(scores=with_derived(program.need("groups"), scores))
