"""What every criterion is: a name, a unit, and scores for each prunable group."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ....data.batch import Calibration
from ....errors import FxpruneError
from ....ir.group import Kind, PruneGroup
from ....ir.program import Program


class CannotScore(FxpruneError):
    """A model that a criterion says nothing about, whatever the data: another criterion may."""


class Criterion(ABC):
    """How much it hurts to lose an element.

    name        as on the command line
    unit        what one unit of score means
    needs_data  True when the model must run on calibration inputs
    only        kinds that it scores, where it does not score all
    sees_experts  True when it also says what an expert is worth: nothing sums over experts, so masks do not tell
    comparable  True when scores of different groups may be ranked against each other (estimated losses);
                False when they only rank elements within a group (norms): a search then ranks shares
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    needs_data: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    scores_tiles: ClassVar[bool] = False
    only: ClassVar[frozenset[str]] = frozenset()
    sees_experts: ClassVar[bool] = False

    def __str__(self) -> str:
        """``name{option=value}``: the text that makes this criterion again."""
        said: list[str] = []
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        for f in fields:
            value = getattr(self, f.name)
            if f.repr and value != f.default:
                said.append(f"{f.name}={str(value).lower() if isinstance(value, bool) else value}")
        return self.name + (f"{{{','.join(said)}}}" if said else "")

    @property
    def measures_sets(self) -> bool:
        """Whether :meth:`together` says anything."""
        return type(self).together is not Criterion.together

    def select_groups(self, program: Program) -> list[PruneGroup]:
        """The groups that :meth:`scores` says something of."""
        if self.only:
            return [g for g in prunable(program) if str(g.kind) in self.only]
        return [g for g in prunable(program) if self.sees_experts or g.kind != Kind.EXPERT]

    @abstractmethod
    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        """Group name -> [size] non-negative scores, for every prunable group. ``data`` is there if ``needs_data``."""

    def assess(self, program: Program, data: Calibration | None, seed: int) -> dict[str, dict[str, Tensor]]:
        """Group name -> the tensors of its ``ImportanceScores``: ``values``, by default the scores, and what else the
        criterion knows of its elements (``gradients``, ``order``, ``curve``)."""
        return {name: {"values": values} for name, values in self.scores(program, data, seed).items()}

    def refine(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        """Group name -> [size] better scores for what the program's plan left in doubt; {} where there are none."""
        return {}

    def together(
        self, program: Program, data: Calibration | None, seed: int, wanted: Mapping[PruneGroup, Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        """Group name -> what losing each of the sets of elements ``wanted`` costs when a whole set goes at once, in the
        unit of ``scores``. [number of sets]. Empty where the criterion knows nothing but sums."""
        return {}

    def notes(self, program: Program) -> Sequence[str]:
        """What the user should know about these scores."""
        return ()


def prunable(program: Program) -> list[PruneGroup]:
    """The groups that want a score. Those that others speak for (parts, ties) are worth what these are, see
    :func:`~fxprune.ir.group.with_derived`."""
    return [g for g in program.need("groups") if g.prunable and not g.members]
