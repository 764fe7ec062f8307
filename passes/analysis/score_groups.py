"""``ScoreGroups``: how much it hurts to lose each element of each prunable group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ... import registry
from ...data.batch import Calibration
from ...errors import FxpruneError, OptionError
from ...ir.group import with_derived
from ...ir.importance import ImportanceScores
from ...ir.pipeline import Analysis
from ...ir.program import Program
from ...ir.spec import build, parse
from .importance.criterion import Criterion


def criterion(text: str) -> Criterion:
    """A criterion from ``name`` or ``name{option=value}``, those of plugins included.

    Raises OptionError with the nearest name or option.
    """
    name, options = parse(text, "--importance")
    made: Criterion = build(registry.lookup("criterion", name), options, f"criterion '{name}'", "--importance")
    return made


def check_data(chosen: Criterion, data: Calibration | None, where: str, cure: str) -> None:
    """Raise OptionError where the criterion runs the model and there is no data to run it on."""
    if chosen.needs_data and (data is None or not data.batches):
        raise OptionError(
            f"criterion '{chosen.name}' needs data",
            where=where,
            why="it runs the model on calibration inputs",
            cure=cure,
        )


@dataclass(frozen=True)
class ScoreGroups(Analysis):
    """Score every prunable group with one criterion.

    criterion   a name (see ``registry.CRITERIA``) or a Criterion of your own
    data        calibration batches, for criteria that run the model
    seed        seeds everything random: the same seed gives the same scores

    Groups that the criterion says nothing of (``Criterion.select_groups``) have no scores.

    Elements of a group that is ``ordered`` go from the end, unless the criterion has an order of its own.

    Errors   OptionError for an unknown name or missing data; FxpruneError naming the weight or node that is not finite
    """

    takes = ("criterion", "data")
    needs = ("axes", "groups")
    gives = ("scores",)

    criterion: str | Criterion = "l2"
    data: Calibration | None = field(default=None, repr=False)
    seed: int = 0

    def runs(self) -> tuple[object, ...]:
        return (criterion(self.criterion) if isinstance(self.criterion, str) else self.criterion,)

    def run(self, program: Program) -> Program:
        chosen = criterion(self.criterion) if isinstance(self.criterion, str) else self.criterion
        check_data(
            chosen,
            self.data,
            f"--importance {chosen.name}",
            "give `--data`, or use a criterion that needs none, such as l2",
        )
        found = chosen.assess(program, self.data if chosen.needs_data else None, self.seed)
        scores = {}
        for group in chosen.select_groups(program):
            if not torch.isfinite(found[group.name]["values"]).all():
                raise FxpruneError(
                    f"criterion '{chosen.name}' gave a score that is not a number",
                    where=group.name,
                    cure="check the weights and the data for NaN",
                )
            given: dict[str, Any] = {"order": torch.arange(group.size)} if group.ordered else {}
            scores[group.name] = ImportanceScores(
                group.name,
                criterion=chosen.name,
                unit=chosen.unit,
                comparable=chosen.comparable,
                seed=self.seed,
                **{**given, **{key: value.cpu() for key, value in found[group.name].items()}},
            )
        notes = list(chosen.notes(program))
        if chosen.needs_data and self.data is not None and self.data.generated:
            notes.append(f"criterion '{chosen.name}' ran on generated inputs, not on real data: {self.data.origin}")
        scores = with_derived(program.need("groups"), scores)
        return program.but(scores=scores, notes=tuple(dict.fromkeys((*program.notes, *notes))))
